"""The op on one device: plan, merge groups, attend."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention.aggregate import plan_and_merge, zero_padding
from dga_jax.attention.plan import GroupPlan, plan_groups
from dga_jax.attention.reference import reference_attention
from dga_jax.config import DGAConfig
from pallas_kernels.dispatch import find_target
from pallas_kernels.group_merge import Entries
from pallas_kernels.grouped_attention import grouped_attention, refusals


def attend(
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
  """`dga_jax.dynamic_group_attention` of the rows and heads of one device.

  Args:
    query: checked, as all arguments are, by the caller.
    key: as query.
    value: as query.
    config: every switch of the mechanism.
    plan: fixes the split into focal tokens and groups.
    lengths: tokens of each row.
    segment_ids: documents packed in the rows.
    scale: of the attention logits.
    implementation: of attention.
  """
  D = query.shape[-1]
  if implementation == "reference":
    if plan is None:
      plan = plan_groups(query, key, config=config, lengths=lengths, segment_ids=segment_ids)
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
    lengths=lengths,
    segment_ids=segment_ids,
    implementation="xla" if implementation == "xla" else None,
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
  target = find_target(query)

  def trace(query: Array, key: Array, value: Array) -> Array:
    plan, query, entries = plan_and_merge(
      query, key, value, config=config, lengths=lengths, segment_ids=segment_ids
    )
    options = attention_kwargs(query, config, scale=None)
    reasons.update(refusals(target, query, plan.bounds.sources(entries), **options))
    return query

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
