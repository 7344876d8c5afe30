"""The op: plan, merge_groups, attend."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention import validation
from dga_jax.attention.aggregate import plan_and_merge, zero_padding
from dga_jax.attention.plan import GroupPlan, plan_groups
from dga_jax.attention.reference import reference_attention
from dga_jax.attention.segments import find_documents
from dga_jax.config import DGAConfig
from pallas_kernels import dispatch
from pallas_kernels.group_merge import Entries
from pallas_kernels.grouped_attention import grouped_attention


def dynamic_group_attention(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  *,
  config: DGAConfig,
  plan: GroupPlan | None = None,
  lengths: Int[Array, "B"] | None = None,
  segment_ids: Int[Array, "B L"] | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> Float[Array, "B L H D"]:
  """Causal attention over focal tokens, merged groups and the raw tokens of one open group.

  Zhang et al., ICML 2025 (arXiv 2505.22107), Algorithm 1, masked before the softmax. Query i
  attends, in one softmax, to the focal tokens j ≤ i, to the groups that end by then, each a
  weighted mean of m tokens' keys and values (Eq. 14), and to the raw members of the group whose
  span it lies in.

  Args:
    query: any float dtype, which all arrays share. Softmax statistics are float32.
    key: N KV heads, N dividing H; query head h belongs to KV head ⌊h / (H/N)⌋.
    value: as key.
    config: every switch of the mechanism.
    plan: fixes the split. Default: `plan_groups(query, key, config=config, ...)`.
    lengths: tokens of each row, the rest being right padding. Default: all L.
    segment_ids: runs of equal ids are documents packed in a row; a negative id is padding. Each
      row and document is computed exactly as it would be alone; padded queries give 0.
    scale: of the attention logits, default 1/√D. The choice of focal tokens always uses 1/√D,
      and the merge weights follow `config.aggregation_scale`.
    implementation: None for the one that `explain` says is taken, "reference" for the masks
      written out, or another name that `explain` lists.

  Returns:
    The query's shape and dtype. Differentiable in query, key and value.

  Raises:
    ValueError: names the argument that does not fit and what it must be.
    NotImplementedError: if the named implementation cannot compute this call, and why.
  """
  validation.query_and_key(query, key)
  validation.value_like_key(value, key)
  validation.softmax_scale(scale)
  validation.implementation(implementation)
  B, L, _, D = query.shape
  validation.rows(B, L, lengths, segment_ids)
  if plan is not None:
    padded = lengths is not None or segment_ids is not None
    documents = find_documents(B, L, lengths, segment_ids) if padded else None
    validation.plan_fits(plan, config, query, key, documents)
  rows = {"lengths": lengths, "segment_ids": segment_ids}
  if implementation == "reference":
    if plan is None:
      plan = plan_groups(query, key, config=config, **rows)
    query, key, value = zero_padding(plan.documents, plan.padded, query, key, value)
    out_BxLxHxD = reference_attention(
      query,
      key,
      value,
      plan.focal_mask,
      plan.documents,
      config=config,
      scale=D**-0.5 if scale is None else scale,
    )
    return nan_where_invalid(plan, out_BxLxHxD)
  plan, query, entries = plan_and_merge(
    query,
    key,
    value,
    config=config,
    plan=plan,
    implementation="xla" if implementation == "xla" else None,
    **rows,
  )
  return attend_entries(query, entries, plan, scale=scale, implementation=implementation)


def explain(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  *,
  config: DGAConfig,
  lengths: Int[Array, "B"] | None = None,
  segment_ids: Int[Array, "B L"] | None = None,
) -> dict[str, str]:
  """Which implementation `dynamic_group_attention` takes by itself, and why not the others.

  Takes the op's arguments, or `jax.ShapeDtypeStruct`s of them, and computes nothing.

  Returns:
    For every implementation, in the order in which they are tried, "taken", "applies" or the
    reason why it does not.
  """
  reasons: dict[str, str | None] = {}
  target = dispatch.find_target(query)

  def trace(query: Array, key: Array, value: Array) -> Array:
    plan, query, entries = plan_and_merge(
      query, key, value, config=config, lengths=lengths, segment_ids=segment_ids
    )
    options = attention_kwargs(query, config, scale=None)
    sources = plan.bounds.sources(entries)
    reasons.update(dispatch.report("grouped_attention", None, query, sources, **options).reasons)
    return query

  with dispatch.collect_reports(target):
    jax.eval_shape(trace, query, key, value)
  taken = next(name for name, reason in reasons.items() if reason is None)
  return {
    name: "taken" if name == taken else reason or "applies" for name, reason in reasons.items()
  }


def attend_entries(
  query: Float[Array, "B L H D"],
  entries: Entries,
  plan: GroupPlan,
  *,
  scale: float | None = None,
  implementation: str | None = None,
) -> Float[Array, "B L H D"]:
  """Attention of every query to what the plan lets it see."""
  out_BxLxHxD = grouped_attention(
    query,
    plan.bounds.sources(entries),
    implementation=implementation,
    **attention_kwargs(query, plan.config, scale),
  )
  return nan_where_invalid(plan, out_BxLxHxD)


def nan_where_invalid(plan: GroupPlan, out_BxLxHxD: Array) -> Array:
  """NaN where a static bound was found broken under jit: loud rather than wrong."""
  if plan.broken is None:
    return out_BxLxHxD
  return jnp.where(plan.broken[..., None, None], jnp.nan, out_BxLxHxD)


def attention_kwargs(query: Array, config: DGAConfig, scale: float | None) -> dict[str, Any]:
  """Keyword arguments of `grouped_attention`."""
  streaming = config.selection == "streaming"
  return {
    "scale": query.shape[-1] ** -0.5 if scale is None else scale,
    "group_bias": math.log(config.group_size) if config.group_logit_bias == "log_size" else 0.0,
    "max_window": (config.local_window + 1) * config.block_size if streaming else config.group_size,
  }
