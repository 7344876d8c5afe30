"""From tokens to what attention reads: focal tokens, merged groups, and the raw window."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention.plan import GroupPlan, plan_chosen_blocks, plan_groups, Rows
from dga_jax.attention.segments import Documents
from dga_jax.config import DGAConfig
from pallas_kernels.group_merge import Entries, merge_blocks, merge_groups


def plan_and_merge(
  query_BxLxHxD: Float[Array, "B L H D"],
  key_BxLxNxD: Float[Array, "B L N D"],
  value_BxLxNxD: Float[Array, "B L N D"],
  *,
  config: DGAConfig,
  plan: GroupPlan | None = None,
  lengths: Int[Array, "B"] | None = None,
  segment_ids: Int[Array, "B L"] | None = None,
  implementation: str | None = None,
) -> tuple[GroupPlan, Float[Array, "B L H D"], Entries]:
  """Makes the plan, unless it is given, and lays out what attention reads under it.

  Args:
    plan: decides on the split.
    lengths: tokens of each row, the rest being right padding.
    segment_ids: runs of equal ids are documents packed in a row; a negative id is padding.
    implementation: None or "xla"; see `pallas_kernels.group_merge`.

  Returns:
    The plan, the query to go on with, and the entries. Padding is hidden in all of them.
  """
  scale = merge_scale(config, query_BxLxHxD.shape[-1])
  # Sinks stand among the blocks' focal tokens: they take the way through the plan's indices.
  if plan is None and config.selection == "streaming" and config.sink_tokens == 0:
    B, L = key_BxLxNxD.shape[:2]
    rows = Rows.of(B, L, config, lengths, segment_ids)
    start_Bxk = rows.block_starts(config)
    query, key, value = zero_padding(
      rows.documents, rows.padded, query_BxLxHxD, key_BxLxNxD, value_BxLxNxD
    )
    query, entries, chosen_BxNxkxf = merge_blocks(
      query,
      key,
      value,
      None if rows.documents.whole_rows else start_Bxk,
      members=config.group_size,
      focal=config.focal_in_block,
      scale=scale,
      implementation=implementation,
    )
    return plan_chosen_blocks(rows, start_Bxk, chosen_BxNxkxf, config), query, entries
  if plan is None:
    plan = plan_groups(
      query_BxLxHxD, key_BxLxNxD, config=config, lengths=lengths, segment_ids=segment_ids
    )
  query, key, value = zero_padding(
    plan.documents, plan.padded, query_BxLxHxD, key_BxLxNxD, value_BxLxNxD
  )
  query, entries = merge_groups(
    query,
    key,
    value,
    plan.focal_index,
    plan.member_index,
    plan.group_query,
    scale=scale,
    reorder_window=config.selection != "streaming",
    implementation=implementation,
  )
  return plan, query, entries


def merge_scale(config: DGAConfig, head_dim: int) -> float:
  """Of the logits of merge weights."""
  return head_dim**-0.5 if config.aggregation_scale == "head_dim" else 1.0


def zero_padding(documents: Documents, padded: bool, *arrays: Array) -> tuple[Array, ...]:
  """[B, L, ...] arrays with zeros in the padding: what lies there must not reach a sum."""
  if not padded:
    return arrays
  token_BxLx1x1 = documents.is_token[..., None, None]
  return tuple(jnp.where(token_BxLx1x1, array, 0) for array in arrays)
