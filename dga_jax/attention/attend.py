"""Dynamic Group Attention on the arrays of one device, step by step.

`prepare` reads the rows once a forward. Then, in every layer: scores → selection → layout →
visibility → merged groups → attention.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dga_jax.attention import validation
from dga_jax.attention.array_parts import take_part
from dga_jax.attention.block_entries import for_kernel
from dga_jax.attention.metadata import AttentionMetadata, StreamingMetadata
from dga_jax.attention.plan import GroupPlan
from dga_jax.attention.scores import importance_scores, random_scores
from dga_jax.attention.segments import Documents
from dga_jax.attention.selection import (
  comparable_scores,
  select_by_score,
  select_in_blocks,
  Selection,
)
from dga_jax.attention.streaming_blocks import cache_layout
from dga_jax.config import DGAConfig
from pallas_kernels.dispatch import Implementation
from pallas_kernels.group_merge import (
  choose_in_blocks,
  Entries,
  highest_in_blocks,
  merge_blocks,
  merge_groups,
)
from pallas_kernels.grouped_attention import grouped_attention, KVSources
from pallas_kernels.head_range import HeadRange


def attend(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  metadata: AttentionMetadata,
  *,
  focal_scores: Float[Array, "B L N"] | None = None,
  scale: float | Float[Array, ""] | None = None,
  implementation: Implementation = None,
) -> Float[Array, "B L H D"]:
  """Selects, merges and attends; see `dynamic_group_attention`, which checks the arguments.

  Args:
    query: any float dtype, which all arrays share.
    key: N KV heads.
    value: as key.
    metadata: from `prepare`.
    focal_scores: float32, with the selector "fitted"; else None.
    scale: multiplies the attention logits; default 1/√D.
    implementation: None for the first that applies, a name, or a tuple of names.
  """
  merged = merge_tokens(
    query, key, value, metadata, focal_scores=focal_scores, implementation=implementation
  )
  return attend_prepared(merged, metadata, scale=scale, implementation=implementation)


def attend_with_plan(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  plan: GroupPlan,
  *,
  scale: float | Float[Array, ""] | None = None,
  implementation: Implementation = None,
) -> Float[Array, "B L H D"]:
  """As `attend`, under the selection, layout and visibility of a plan."""
  merged = merge_planned(query, key, value, plan, implementation=implementation)
  return attend_merged(
    merged, plan.invalid, plan.config, scale=scale, implementation=implementation
  )


class Merged(NamedTuple):
  """The arguments of `grouped_attention`.

  Use this query downstream, not the one that was merged with: gradients of both uses then
  accumulate into one buffer.
  """

  query: Float[Array, "B L H D"]
  sources: KVSources


def merge_tokens(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  metadata: AttentionMetadata,
  *,
  heads: HeadRange | None = None,
  focal_scores: Float[Array, "B L n"] | None = None,
  implementation: Implementation = None,
) -> Merged:
  """Chooses focal tokens and merges the others into groups.

  Causal streaming selection on rows of one document needs neither a layout nor a focal mask: its
  visibility is part of the metadata, one op chooses in the blocks and merges them, and the sinks
  are the first tokens of the row.

  Args:
    query: any float dtype, which all arrays share.
    key: N KV heads.
    value: as key.
    metadata: from `prepare`.
    heads: the n KV heads that are merged; None for all of them. With a range the selection must be
      streaming and causal, and padding must be zero. The focal and group sources of the result have
      these heads; the query and the window source have all heads.
    focal_scores: float32, with the selector "fitted"; else None.
    implementation: as for `attend`.
  """
  config, streaming = metadata.config, metadata.by_selection
  own_query, own_key = (x if heads is None else heads.of(x, key.shape[2]) for x in (query, key))
  validation.focal_scores(focal_scores, own_key, config)
  # Sinks of packed documents are anywhere in the row, so their positions come from a layout.
  packed_sinks = config.sink_tokens > 0 and metadata.documents.rows == "packed"
  needs_plan = packed_sinks or not config.causal
  if not isinstance(streaming, StreamingMetadata) or needs_plan:
    plan = make_plan(own_query, own_key, metadata, focal_scores)
    return merge_planned(query, key, value, plan, heads=heads, implementation=implementation)
  if heads is None:
    query, key, value = zero_padding(metadata.documents, query, key, value)
  query, entries, _ = merge_blocks(
    query,
    key,
    value,
    None if metadata.documents.rows == "whole" else streaming.blocks.start,
    None if focal_scores is None else comparable_scores(focal_scores),
    members=config.group_size,
    focal=config.focal_in_block,
    scale=merge_scale(config, query.shape[-1]),
    first=config.sink_tokens,
    heads=heads,
    implementation=merging_implementation(implementation),
  )
  if config.sink_tokens > 0:
    entries = _with_sinks(entries, config.sink_tokens, heads)
  assert streaming.visibility is not None  # Causal streaming selection has it.
  return Merged(query, streaming.visibility.sources(entries))


def _with_sinks(entries: Entries, sinks: int, heads: HeadRange | None) -> Entries:
  """The sinks of rows of one document precede the focal tokens of the blocks."""
  B, _, N, _ = entries.window_key.shape
  first, count = heads or (0, N)
  part = ((0, 0, first), (B, sinks, count))
  window_key, sink_key = take_part(entries.window_key, *part)
  window_value, sink_value = take_part(entries.window_value, *part)
  return entries._replace(
    focal_key=jnp.concatenate([sink_key, entries.focal_key], axis=1),
    focal_value=jnp.concatenate([sink_value, entries.focal_value], axis=1),
    window_key=window_key,
    window_value=window_value,
  )


def make_plan(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  metadata: AttentionMetadata,
  focal_scores: Float[Array, "B L N"] | None = None,
) -> GroupPlan:
  """Scores, selection, layout and visibility. No gradient flows through the choice."""
  query, key = jax.lax.stop_gradient((query, key))
  selection = select(query, key, metadata, focal_scores)
  return GroupPlan.from_selection(selection, metadata)


def select(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  metadata: AttentionMetadata,
  focal_scores: Float[Array, "B L N"] | None = None,
) -> Selection:
  """Chooses the focal tokens of every row, document and KV head."""
  documents, config, rule = metadata.documents, metadata.config, metadata.by_selection
  validation.focal_scores(focal_scores, key, config)
  if isinstance(rule, StreamingMetadata):
    start_Bxk, sizes = (
      rule.blocks.start,
      {"size": config.block_size, "focal": config.focal_in_block},
    )
    if focal_scores is None:
      chosen_BxNxkxf = choose_in_blocks(query, key, start_Bxk, **sizes)
    else:
      chosen_BxNxkxf = highest_in_blocks(comparable_scores(focal_scores), start_Bxk, **sizes)
    return select_in_blocks(chosen_BxNxkxf, rule.blocks)
  if rule.samples is not None:
    scores_BxNxL = importance_scores(query, key, rule.samples)
  else:
    scores_BxNxL = random_scores(documents, key.shape[2], config.seed)
  return select_by_score(scores_BxNxL, documents, rule.quotas, config)


def merge_planned(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  plan: GroupPlan,
  *,
  heads: HeadRange | None = None,
  implementation: Implementation = None,
) -> Merged:
  """Merges the groups of a plan and lays out what attention reads.

  Args:
    query: any float dtype, which all arrays share.
    key: N KV heads.
    value: as key.
    plan: of the KV heads in `heads`.
    heads: as for `merge_tokens`.
    implementation: as for `attend`.
  """
  config = plan.config
  if heads is None:
    query, key, value = zero_padding(plan.documents, query, key, value)
  query, entries = merge_groups(
    query,
    key,
    value,
    *plan.layout,
    scale=merge_scale(config, query.shape[-1]),
    reorder_window=plan.window_lists_members,
    heads=heads,
    implementation=merging_implementation(implementation),
  )
  return Merged(query, plan.visibility.sources(entries))


def attend_prepared(
  merged: Merged,
  metadata: AttentionMetadata,
  *,
  scale: float | Float[Array, ""] | None = None,
  implementation: Implementation = None,
) -> Float[Array, "B L H D"]:
  """As `attend_merged`, for the result of `merge_tokens`."""
  merged = merged._replace(sources=for_kernel(merged.query, merged.sources, metadata))
  return attend_merged(
    merged, metadata.invalid, metadata.config, scale=scale, implementation=implementation
  )


def attend_merged(
  merged: Merged,
  invalid: Array | None,
  config: DGAConfig,
  *,
  scale: float | Float[Array, ""] | None = None,
  implementation: Implementation = None,
) -> Float[Array, "B L H D"]:
  """Attention of every query to the ranges that it sees of the sources."""
  out_BxLxHxD = grouped_attention(
    merged.query,
    merged.sources,
    implementation=implementation,
    **attention_kwargs(merged.query, config, scale),
  )
  return nan_where_invalid(out_BxLxHxD, invalid)


def attention_kwargs(
  query: Array, config: DGAConfig, scale: float | Float[Array, ""] | None
) -> dict[str, Any]:
  """Keyword arguments of `grouped_attention`, but for `implementation`."""
  if not config.causal:
    # A query sees up to 2w + 1 groups raw. The windows of the queries of a tile cover one more.
    max_window = (2 * config.local_window + 2) * config.group_size
  elif config.selection == "streaming":
    max_window = cache_layout(config).raw_size
  else:
    max_window = config.group_size
  return {
    "scale": query.shape[-1] ** -0.5 if scale is None else scale,
    "group_bias": math.log(config.group_size) if config.group_logit_bias == "log_size" else 0.0,
    "max_window": max_window,
  }


def merge_scale(config: DGAConfig, head_dim: int) -> float:
  """Scale of the merge logits."""
  return head_dim**-0.5 if config.aggregation_scale == "head_dim" else 1.0


def merging_implementation(implementation: Implementation) -> Implementation:
  """The implementation of merging for one of attention: "xla" for "xla", else the fastest."""
  return "xla" if implementation in ("xla", ("xla",)) else None


def zero_padding(documents: Documents, *arrays: Array) -> tuple[Array, ...]:
  """[B, L, ...] arrays with zeros in the padding, whose content must not reach a sum."""
  if documents.rows == "whole":
    return arrays
  is_token_BxLx1x1 = documents.is_token[..., None, None]
  return tuple(jnp.where(is_token_BxLx1x1, array, 0) for array in arrays)


def nan_where_invalid(
  out_BxLxHxD: Float[Array, "B L H D"], invalid_BxL: Array | None
) -> Float[Array, "B L H D"]:
  """NaN for queries whose row or document exceeds a static bound, which jit cannot raise for."""
  if invalid_BxL is None:
    return out_BxLxHxD
  return jnp.where(invalid_BxL[..., None, None], jnp.nan, out_BxLxHxD)
