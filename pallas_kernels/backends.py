"""The table of ops: for each op its backends, in order of preference."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels.target import Target


class Requirement(NamedTuple):
  """The device that a backend needs."""

  device: str
  is_met_by: Callable[[Target], bool]


ANY = Requirement("any device", lambda target: True)
AMPERE = Requirement("an Ampere or newer GPU", lambda target: target.runs_triton)
HOPPER = Requirement("a Hopper GPU", lambda target: target.capability == 9.0)
TPU = Requirement("a TPU", lambda target: target.platform == "tpu")


class Backend(NamedTuple):
  """One implementation of an op.

  A function is callable, or given as "module:name" below `pallas_kernels` and imported when a call
  for the right device needs it: kernel modules load compilers that most machines never use.
  """

  name: str
  requirement: Requirement
  # None where the caller of `choose` runs other ops in place of this one.
  function: str | Callable[..., Any] | None
  # A function of the op's arguments that returns why this backend cannot run them, or None.
  refusal: str | Callable[..., str | None] | None = None
  # Why the backend runs only if it is named; None if it may be chosen by default.
  only_by_name: str | None = None
  # Returns why this machine cannot trace the backend for any device, or None. An explanation lists
  # the backend for the target device all the same.
  host_refusal: Callable[[], str | None] | None = None


# For each op its backends, the preferred one first. The last serves any device.
OPS: dict[str, tuple[Backend, ...]] = {
  "grouped_attention": (
    Backend(
      "mosaic_gpu",
      HOPPER,
      "grouped_attention.mosaic_gpu_attention:grouped_attention_mosaic_gpu",
      "grouped_attention.mosaic_gpu_attention:refusal",
    ),
    Backend(
      "mosaic_tpu",
      TPU,
      "grouped_attention.mosaic_tpu_attention:grouped_attention_mosaic_tpu",
      "grouped_attention.mosaic_tpu_attention:refusal",
    ),
    Backend(
      "triton",
      AMPERE,
      "grouped_attention.triton_attention:grouped_attention_triton",
      "grouped_attention.triton_attention:refusal",
    ),
    Backend(
      "jax_triton",
      AMPERE,
      "grouped_attention.jax_triton_forward:grouped_attention_jax_triton",
      "grouped_attention.jax_triton_forward:refusal",
      only_by_name="it has no backward pass",
    ),
    Backend(
      "reference",
      ANY,
      "grouped_attention.reference:grouped_attention_reference",
      only_by_name="it is the slow oracle of the tests",
    ),
    Backend("xla", ANY, "grouped_attention.xla:grouped_attention_xla"),
  ),
  "merge_groups": (
    Backend(
      "triton",
      AMPERE,
      "group_merge.triton_group_merge:merge_groups_triton",
      "group_merge.triton_group_merge:merge_groups_refusal",
    ),
    Backend(
      "mosaic_tpu",
      TPU,
      "group_merge.mosaic_tpu_group_merge:merge_groups_mosaic_tpu",
      "group_merge.mosaic_tpu_group_merge:merge_groups_refusal",
    ),
    Backend("xla", ANY, "group_merge.xla:merge_groups_xla"),
  ),
  "merge_blocks": (
    Backend(
      "triton",
      AMPERE,
      "group_merge.triton_group_merge:merge_blocks_triton",
      "group_merge.triton_group_merge:merge_blocks_refusal",
    ),
    Backend(
      "mosaic_tpu",
      TPU,
      "group_merge.mosaic_tpu_group_merge:merge_blocks_mosaic_tpu",
      "group_merge.mosaic_tpu_group_merge:merge_blocks_refusal",
    ),
    Backend("xla", ANY, "group_merge.xla:merge_blocks_xla"),
  ),
  "sampled_importance": (
    Backend(
      "triton",
      AMPERE,
      "importance.triton_importance:sampled_importance_triton",
      "importance.triton_importance:refusal",
    ),
    Backend(
      "mosaic_tpu",
      TPU,
      "importance.mosaic_tpu_importance:sampled_importance_mosaic_tpu",
      "importance.mosaic_tpu_importance:refusal",
    ),
    Backend("xla", ANY, "importance.xla:sampled_importance_xla"),
  ),
  "segmented_top_k": (
    Backend(
      "triton",
      AMPERE,
      "segmented_top_k.triton_top_k:segmented_top_k_triton",
      "segmented_top_k.triton_top_k:refusal",
    ),
    Backend(
      "mosaic_tpu",
      TPU,
      "segmented_top_k.mosaic_tpu_top_k:segmented_top_k_mosaic_tpu",
      "segmented_top_k.mosaic_tpu_top_k:refusal",
    ),
    Backend("xla", ANY, "segmented_top_k.xla:segmented_top_k_xla"),
  ),
  "compact_indices": (
    Backend(
      "mosaic_tpu",
      TPU,
      "compact_indices.mosaic_tpu_compact_indices:compact_indices_mosaic_tpu",
      "compact_indices.mosaic_tpu_compact_indices:refusal",
    ),
    Backend("xla", ANY, "compact_indices.xla:compact_indices_xla"),
  ),
  "decode_attention": (
    Backend(
      "mosaic_tpu",
      TPU,
      "decode.mosaic_tpu_decode:decode_attention_mosaic_tpu",
      "decode.api:attention_refusal",
    ),
    Backend("xla", ANY, "decode.xla:decode_attention_xla"),
  ),
  # "triton" is one kernel for a whole step. The others are `decode_attention`, and XLA appends
  # the token and merges complete blocks.
  "decode_step": (
    Backend("triton", AMPERE, "decode.triton_step:step_triton", "decode.api:step_refusal"),
    Backend(
      "mosaic_tpu",
      TPU,
      "decode.mosaic_tpu_decode:decode_attention_mosaic_tpu",
      "decode.api:attention_refusal",
    ),
    Backend("xla", ANY, "decode.xla:decode_attention_xla"),
  ),
  "dense_decode_step": (
    Backend(
      "triton", AMPERE, "decode.triton_dense:dense_step_triton", "decode.triton_dense:refusal"
    ),
    Backend("xla", ANY, "decode.xla_dense:dense_step_xla"),
  ),
  # One kernel for all heads of a layer with settings of their own, or a step for each setting.
  "decode_heads": (
    Backend(
      "triton",
      AMPERE,
      "decode.triton_heads:heads_step_triton",
      "decode.api:heads_step_refusal",
    ),
    Backend("each_setting", ANY, None),
  ),
  "quantized_product": (
    Backend(
      "triton",
      AMPERE,
      "quantized_product.triton_product:quantized_product_triton",
      "quantized_product.api:refusal",
    ),
    Backend("xla", ANY, "quantized_product.xla:quantized_product_xla"),
  ),
  "rms_norm": (
    Backend("triton", AMPERE, "rms_norm.triton_rms_norm:rms_norm_triton", "rms_norm.api:refusal"),
    Backend("xla", ANY, "rms_norm.equation:rms_norm_xla"),
  ),
}
