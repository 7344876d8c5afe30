"""Checks of arguments, made while tracing. Each message names the argument and what it must be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dga_jax.attention.layout import StreamingBlocks
from dga_jax.attention.segments import Documents
from dga_jax.config import DGAConfig
from pallas_kernels import dispatch


def is_traced(x: Any) -> bool:
  """Whether values are unknown, as under jit."""
  return isinstance(x, jax.core.Tracer)


def query_and_key(query: Array, key: Array) -> None:
  """Shapes [B, L, H, D] and [B, L, N, D] with N dividing H, and one float dtype."""
  for name, x in (("query", query), ("key", key)):
    if not hasattr(x, "shape") or x.ndim != 4:
      raise ValueError(
        f"{name} has shape {np.shape(x)}; it must be [batch, length, heads, head_dim]."
      )
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} has dtype {x.dtype}; it must be floating point.")
  B, L, H, D = query.shape
  if min(query.shape) == 0 or key.shape[2] == 0:
    raise ValueError(f"query {query.shape} and key {key.shape} must have no empty dimension.")
  if (key.shape[0], key.shape[1], key.shape[3]) != (B, L, D):
    raise ValueError(
      f"key has shape {key.shape}; beside query {query.shape} it must be [{B}, {L}, KV heads, {D}]."
    )
  if H % key.shape[2]:
    raise ValueError(
      f"query has {H} heads and key {key.shape[2]}; KV heads must divide query heads."
    )
  if query.dtype != key.dtype:
    raise ValueError(f"key is {key.dtype} and query {query.dtype}; cast them to one dtype.")


def value_like_key(value: Array, key: Array) -> None:
  """The value has the key's shape and dtype."""
  if np.shape(value) != key.shape:
    raise ValueError(f"value has shape {np.shape(value)}; it must be the key's, {key.shape}.")
  if value.dtype != key.dtype:
    raise ValueError(f"value is {value.dtype} and key {key.dtype}; cast them to one dtype.")


def rows(batch: int, length: int, lengths: Array | None, segment_ids: Array | None) -> None:
  """lengths is int [B] within 0..L (where known), segment_ids int [B, L]."""
  wants: dict[str, tuple[Any, tuple[int, ...]]] = {
    "lengths": (lengths, (batch,)),
    "segment_ids": (segment_ids, (batch, length)),
  }
  for name, (x, shape) in wants.items():
    if x is None:
      continue
    if np.shape(x) != shape or not jnp.issubdtype(jnp.result_type(x), jnp.integer):
      raise ValueError(
        f"{name} is {jnp.result_type(x)}{list(np.shape(x))}; it must be int{list(shape)}."
      )
  if lengths is not None and not is_traced(lengths):
    values = np.asarray(lengths)
    if values.size and (values.min() < 0 or values.max() > length):
      raise ValueError(
        f"lengths has values from {values.min()} to {values.max()}; they must lie in"
        f" 0..{length}, the arrays' length."
      )


def softmax_scale(scale: float | Array | None) -> None:
  """A scale is a positive number, or a traced scalar."""
  if scale is None or is_traced(scale):
    return
  if np.ndim(scale) != 0 or not np.isfinite(scale) or scale <= 0:
    raise ValueError(f"scale is {scale!r}; it must be a positive number.")


def implementation(choice: dispatch.Implementation) -> None:
  """None, a backend of grouped attention, or a tuple of them."""
  dispatch.check_implementation("grouped_attention", choice)


def document_bound(
  config: DGAConfig, length: int, documents: Documents, segment_ids: Array | None
) -> int:
  """How many documents a row can hold."""
  if segment_ids is None:
    return 1
  if not is_traced(documents.index):
    most = int(documents.index.max()) + 1
    if config.max_documents is not None and most > config.max_documents:
      raise ValueError(
        f"segment_ids holds {most} documents in a row; DGAConfig.max_documents is"
        f" {config.max_documents}. Raise it, or pack fewer."
      )
    return max(1, config.max_documents or most)
  if config.max_documents is not None:
    return config.max_documents
  if config.selection == "streaming" and config.sink_tokens == 0:
    return length
  raise ValueError(
    "segment_ids is traced (under jit or grad) and DGAConfig.max_documents is None; set it to"
    " the most documents that a row packs."
  )


def focal_mask(mask: Array) -> None:
  """A focal mask is bool [B, N, L] without empty dimensions."""
  if np.ndim(mask) != 3 or jnp.result_type(mask) != jnp.bool_ or 0 in np.shape(mask):
    raise ValueError(
      f"focal_mask is {jnp.result_type(mask)}{list(np.shape(mask))}; it must be"
      " bool [batch, KV heads, length]."
    )


def focal_bound(focal_B: Array, max_focal: int | None) -> int:
  """The static size of the list of focal tokens."""
  if is_traced(focal_B):
    if max_focal is None:
      raise ValueError(
        "focal_mask is traced and max_focal is None; set it to the most focal tokens of a"
        " row and KV head."
      )
    return max_focal
  most = int(focal_B.max())
  if max_focal is not None and most > max_focal:
    raise ValueError(f"focal_mask keeps {most} tokens in a row; max_focal is {max_focal}.")
  return most if max_focal is None else max_focal


def focal_in_blocks(mask_BxNxL: Array, documents: Documents, config: DGAConfig) -> None:
  """Every complete streaming block keeps exactly f tokens (where values are known)."""
  if is_traced(mask_BxNxL):
    raise ValueError(
      "focal_mask is traced, but with selection='streaming' its blocks must be counted;"
      " make the plan outside jit, or with plan_groups."
    )
  blocks = StreamingBlocks.of(documents, config)
  first = np.asarray(blocks.complete & (blocks.offset == 0))
  mask = np.asarray(mask_BxNxL)
  for row, start in np.argwhere(first):
    kept = mask[row, :, start : start + config.block_size].sum(axis=-1)
    if (kept != config.focal_in_block).any():
      raise ValueError(
        f"focal_mask keeps {kept.tolist()} tokens in the block at row {row}, position"
        f" {start}; with selection='streaming' it must keep {config.focal_in_block} in"
        " each KV head."
      )


def plan_fits(
  plan: Any, config: DGAConfig, query: Array, key: Array, documents: Documents | None
) -> None:
  """A plan fits the config, the shapes and (where values are known) the rows it is used with."""
  wants = (query.shape[0], key.shape[2], query.shape[1])
  if plan.focal_mask.shape != wants:
    raise ValueError(
      f"plan.focal_mask has shape {plan.focal_mask.shape}; query and key want {wants}."
    )
  if plan.config != config:
    raise ValueError(
      f"plan was made with {plan.config}; config is {config}. They must be the same."
    )
  if documents is None or is_traced(documents.index) or is_traced(plan.documents.index):
    return
  if not np.array_equal(documents.index, plan.documents.index):
    raise ValueError(
      "plan was made for other lengths or segment_ids than the ones passed beside it; leave"
      " them out, or make the plan with them."
    )
