"""The op for heads with settings of their own: each class of heads under its setting."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from dga_jax.attention.attend import zero_padding
from dga_jax.attention.dense import dense_attention
from dga_jax.attention.head_classes import HeadClasses, switch_rows
from dga_jax.attention.joint_heads import attend_jointly, attends_jointly, SettingMetadata
from dga_jax.attention.metadata import prepare
from dga_jax.attention.reference import number_documents, reference_sink_window
from dga_jax.attention.segments import Documents, find_documents, IntArray
from dga_jax.attention.sink_window import attend_sink_window, prepare_sink_window
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import HeadBudgets, HeadRow, HeadSetting, SinkWindow, split_row
from dga_jax.sharding import head_part
from pallas_kernels.dispatch import Implementation


def attend_heads(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  budgets: HeadBudgets,
  attend: Callable[..., Array],
  *,
  focal_scores: Float[Array, "B L N"] | None = None,
  lengths: IntArray | None = None,
  segment_ids: IntArray | None = None,
  scale: Any = None,
  implementation: Implementation = None,
) -> Float[Array, "B L H D"]:
  """Attention of every head under the setting of its KV head.

  Inside a `jax.shard_map` over mesh axes that split heads, the device takes its own part of the
  assignment.

  Args:
    query: the device's heads.
    key: likewise.
    value: likewise.
    budgets: of one layer and all of its KV heads.
    attend: Dynamic Group Attention of the same rows, (config, query, key, value, focal_scores) to
      the output.
    focal_scores: likewise, if a setting has the selector "fitted".
    lengths: tokens of each row; None for L.
    segment_ids: of packed documents; None for one document in each row.
    scale: of the attention logits, default 1/√D.
    implementation: of the heads with a `DGAConfig` or a `SinkWindow`. "xla" and "reference" run the
      heads with the setting "full" in XLA too.
  """
  B, L = query.shape[:2]
  part, parts = head_part()
  documents = find_documents(B, L, lengths, segment_ids)
  is_reference = implementation in ("reference", ("reference",))
  in_xla = is_reference or implementation in ("xla", ("xla",))

  def attend_class(index: int, query: Array, key: Array, value: Array, *scores: Array) -> Array:
    setting = budgets.settings[index]
    if isinstance(setting, DGAConfig):
      own = scores[0][..., 0] if scores and setting.selector == "fitted" else None
      return attend(setting, query, key, value, own)
    if isinstance(setting, SinkWindow):
      return attend_window(setting, query, key, value)
    query, key, value = zero_padding(documents, query, key, value)
    return dense_attention(
      query, key, value, documents, scale=scale, implementation="xla" if in_xla else None
    )

  def attend_window(setting: SinkWindow, query: Array, key: Array, value: Array) -> Array:
    sizes = {"sinks": setting.sinks, "window": setting.window}
    if is_reference:
      document_BxL = number_documents(B, L, lengths, segment_ids)
      return reference_sink_window(query, key, value, document_BxL, scale=scale, **sizes)
    metadata = prepare_sink_window(documents, **sizes)
    return attend_sink_window(
      query, key, value, metadata, scale=scale, implementation=implementation
    )

  def attend_row(row: HeadRow, query: Array, key: Array, value: Array, *scores: Array) -> Array:
    classes = HeadClasses(row)
    if not attends_jointly(query, classes, budgets.settings, implementation):
      return classes.map(attend_class, query, key, value, *scores)
    return attend_jointly(
      query,
      key,
      value,
      classes,
      {index: prepare_setting(budgets.settings[index], documents) for index in classes.settings},
      focal_scores=scores[0][..., 0] if scores else None,
      scale=scale,
      implementation=implementation,
    ).out

  return switch_rows(
    split_row(budgets.assignment[0], parts),
    part,
    attend_row,
    query,
    key,
    value,
    *(() if focal_scores is None else (focal_scores[..., None],)),
  )


def prepare_setting(setting: HeadSetting, documents: Documents) -> SettingMetadata:
  """The metadata of a setting."""
  if isinstance(setting, DGAConfig):
    return prepare(documents, setting)
  if isinstance(setting, SinkWindow):
    return prepare_sink_window(documents, sinks=setting.sinks, window=setting.window)
  return documents
