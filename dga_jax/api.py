"""The public op: checks, the mesh, and the call of `dga_jax.attention` on each device's part."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from dga_jax.attention import validation
from dga_jax.attention.attend import attend, attend_with_plan, make_plan, nan_where_invalid
from dga_jax.attention.attend_heads import attend_heads
from dga_jax.attention.metadata import prepare
from dga_jax.attention.partition import AttentionPartition, find_partition
from dga_jax.attention.plan import GroupPlan
from dga_jax.attention.reference import number_documents, reference_attention
from dga_jax.attention.segments import count_documents, find_documents, IntArray
from dga_jax.attention.unbatched import accepts_unbatched
from dga_jax.attention.validation import Lengths, SegmentIds, SequenceIds
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import HeadBudgets
from pallas_kernels.dispatch import Implementation

__all__ = ["dynamic_group_attention", "plan_groups"]


@accepts_unbatched
def dynamic_group_attention(
  query: Float[Array, "*B L H D"],
  key: Float[Array, "*B L N D"],
  value: Float[Array, "*B L N D"],
  *,
  config: DGAConfig | HeadBudgets,
  plan: GroupPlan | None = None,
  lengths: Lengths | None = None,
  segment_ids: SegmentIds | SequenceIds | None = None,
  focal_scores: Float[Array, "*B L N"] | None = None,
  scale: float | Float[Array, ""] | None = None,
  sharding: NamedSharding | None = None,
  implementation: Implementation = None,
) -> Float[Array, "*B L H D"]:
  """Attention to focal tokens, merged groups and the raw tokens of one open group.

  Zhang et al., ICML 2025 (arXiv 2505.22107), Algorithm 1, masked before the softmax. One softmax
  of query i covers the focal tokens j ≤ i, the groups that end at or before i, each a weighted
  mean of the keys and values of m tokens (Eq. 14), and the raw members of the open group of i.

  With `config.causal=False`, for encoders, it covers all focal tokens, the raw members of the group
  whose span contains i, and all other groups.

  On a mesh, rows (B) and heads (H and N alike) may be split, and every device attends to its own
  rows and heads. Explicit mesh axes are found in the types of the arrays. Auto axes are found in
  concrete arrays; under jit, `sharding` names them. Inside a `jax.shard_map` the arrays are one
  device's part. The output is split like the query.

  Args:
    query: any float dtype, the same for all arrays. Softmax statistics are float32. The batch axis
      may be absent from all three arrays.
    key: N KV heads, where N divides H; query head h belongs to KV head ⌊h / (H/N)⌋.
    value: as key.
    config: every switch of the mechanism; or `HeadBudgets` of one layer, which give each KV head
      and its query heads a setting of their own. Heads with the setting "full" run causal dense
      attention, heads with a `SinkWindow` attend to sinks and a sliding window. Adjacent heads of
      one setting are one slice of the arrays; see `HeadBudgets.contiguous_order`.
    plan: fixes the split into focal tokens and groups. Default:
      `plan_groups(query, key, config=config, ...)`. Not with `HeadBudgets`.
    lengths: tokens of each row, an int array or a list; later tokens are padding. Default: L.
    segment_ids: runs of equal ids are documents packed in a row; negative ids are padding. An int
      array or a list of lists. Each row and document is computed as if it were alone. Padded
      queries give 0.
    focal_scores: float32, required with the selector "fitted": of each block and KV head, the
      tokens with the highest scores stay focal, compared with 8 significant bits (ties: the earlier
      token). No gradient flows through the scores. The score of a token must not depend on later
      tokens where the output must be causal.
    scale: of the attention logits, default 1/√D. The choice of focal tokens always uses 1/√D, and
      `config.aggregation_scale` sets the scale of merge weights.
    sharding: of the query, for a mesh whose axes are Auto: `NamedSharding(mesh,
      PartitionSpec(batch axes, None, head axes))`. Key and value are split alike.
    implementation: of attention: None for the fastest that applies, a name that `explain` lists, or
      a tuple of names in order of preference. "reference" computes the whole op with L×L masks.
      "xla" also merges groups in XLA.

  Returns:
    Shape and dtype of the query. Differentiable in query, key and value in reverse mode. Forward
    mode (`jax.jvp`) raises JAX's `TypeError` in kernels and, for keys and values, with sinks.

  Raises:
    ValueError: an argument does not fit; the message names the argument and the remedy.
    NotImplementedError: the named implementation cannot compute this call; the message says why.
  """
  validation.query_and_key(query, key)
  validation.value_like_key(value, key)
  validation.softmax_scale(scale)
  validation.implementation(implementation)
  validation.config_type(config, (DGAConfig, HeadBudgets))
  B, L = query.shape[:2]
  lengths, segment_ids = validation.rows(B, L, lengths, segment_ids)
  if isinstance(config, HeadBudgets):
    validation.head_budgets(config, key, plan)
  elif plan is not None:
    plan.check_fits(query, key, config, lengths=lengths, segment_ids=segment_ids)
  validation.focal_scores(focal_scores, key, config, plan)
  query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
  partition = find_partition(query, key, value, sharding)
  if partition is None:
    return _attend_on_device(
      query,
      key,
      value,
      config=config,
      plan=plan,
      lengths=lengths,
      segment_ids=segment_ids,
      focal_scores=focal_scores,
      scale=scale,
      implementation=implementation,
    )
  traced_scale = scale if validation.is_traced(scale) else None
  return _attend_on_mesh(
    {
      "query": query,
      "key": key,
      "value": value,
      **_present(
        lengths=lengths,
        segment_ids=segment_ids,
        focal_scores=focal_scores,
        plan=plan,
        scale=traced_scale,
      ),
    },
    partition=partition,
    config=config if plan is not None else _with_document_bound(config, lengths, segment_ids),
    scale=None if scale is None or traced_scale is not None else float(scale),
    implementation=implementation,
  )


def plan_groups(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  *,
  config: DGAConfig,
  lengths: Lengths | None = None,
  segment_ids: SegmentIds | None = None,
  focal_scores: Float[Array, "B L N"] | None = None,
  sharding: NamedSharding | None = None,
) -> GroupPlan:
  """Chooses focal tokens and groups for every row, document and KV head.

  Global selection ranks keys by the attention that sampled queries pay to them (Eq. 16 and 17 of
  arXiv 2505.22107). Under streaming selection the last query of each block, or the focal scores,
  choose the block's focal tokens. Random selection draws them. Each row and document is planned
  as if it were alone. No gradient flows through a plan.

  Args:
    query: any float dtype. Query head h belongs to KV head ⌊h / (H/N)⌋.
    key: same dtype as query.
    config: see `DGAConfig`.
    lengths: tokens of each row, an int array or a list; later tokens are padding. Default: L.
    segment_ids: runs of equal ids are documents packed in a row; negative ids are padding. An int
      array or a list of lists.
    focal_scores: as for `dynamic_group_attention`.
    sharding: of the query, as for `dynamic_group_attention`.

  Returns:
    A plan for `dynamic_group_attention`; `plan.focal_mask` is bool [B, N, L]. Its arrays are split
    over the mesh as query and key are.

  Raises:
    ValueError: an argument does not fit; the message names the argument and the remedy. Under jit,
      segment_ids need config.max_documents (see `DGAConfig`).
  """
  validation.query_and_key(query, key)
  validation.config_type(config)
  B, L = query.shape[:2]
  lengths, segment_ids = validation.rows(B, L, lengths, segment_ids)
  validation.focal_scores(focal_scores, key, config)
  query, key = jnp.asarray(query), jnp.asarray(key)
  partition = find_partition(query, key, key, sharding)
  if partition is None:
    metadata = prepare(find_documents(B, L, lengths, segment_ids), config)
    return make_plan(query, key, metadata, focal_scores)
  bounded = _with_document_bound(config, lengths, segment_ids)
  assert isinstance(bounded, DGAConfig)
  plan = _plan_on_mesh(
    {
      "query": query,
      "key": key,
      **_present(lengths=lengths, segment_ids=segment_ids, focal_scores=focal_scores),
    },
    partition=partition,
    config=bounded,
  )
  return dataclasses.replace(plan, config=config)


def _attend_on_device(
  query: Array,
  key: Array,
  value: Array,
  *,
  config: DGAConfig | HeadBudgets,
  plan: GroupPlan | None = None,
  lengths: IntArray | None = None,
  segment_ids: IntArray | None = None,
  focal_scores: Array | None = None,
  scale: Any = None,
  implementation: Implementation = None,
) -> Array:
  """The op of the rows and heads of one device; the caller has checked the arguments."""
  B, L, _, D = query.shape
  if isinstance(config, HeadBudgets):

    def attend_class(
      config: DGAConfig, query: Array, key: Array, value: Array, focal_scores: Array | None
    ) -> Array:
      return _attend_on_device(
        query,
        key,
        value,
        config=config,
        lengths=lengths,
        segment_ids=segment_ids,
        focal_scores=focal_scores,
        scale=scale,
        implementation=implementation,
      )

    return attend_heads(
      query,
      key,
      value,
      config,
      attend_class,
      focal_scores=focal_scores,
      lengths=lengths,
      segment_ids=segment_ids,
      scale=scale,
      implementation=implementation,
    )
  whole = lengths is None and segment_ids is None
  if implementation in ("reference", ("reference",)):
    if plan is None:
      documents = find_documents(B, L, lengths, segment_ids)
      plan = make_plan(query, key, prepare(documents, config), focal_scores)
    out_BxLxHxD = reference_attention(
      query,
      key,
      value,
      plan.focal_mask,
      plan.documents.index if whole else number_documents(B, L, lengths, segment_ids),
      config=config,
      scale=D**-0.5 if scale is None else scale,
    )
    return nan_where_invalid(out_BxLxHxD, plan.invalid)
  if plan is not None:
    return attend_with_plan(query, key, value, plan, scale=scale, implementation=implementation)
  metadata = prepare(find_documents(B, L, lengths, segment_ids), config)
  return attend(
    query,
    key,
    value,
    metadata,
    focal_scores=focal_scores,
    scale=scale,
    implementation=implementation,
  )


@functools.partial(jax.jit, static_argnames=("partition", "config", "scale", "implementation"))
def _attend_on_mesh(
  operands: dict[str, Any],
  *,
  partition: AttentionPartition,
  config: DGAConfig | HeadBudgets,
  scale: float | Float[Array, ""] | None,
  implementation: Implementation,
) -> Array:
  def attend_part(operands: dict[str, Any]) -> Array:
    return _attend_on_device(
      **{"scale": scale} | operands,
      config=config,
      implementation=implementation,
    )

  states, rows = partition.states, partition.rows
  specs: dict[str, Any] = {
    "query": states,
    "key": states,
    "value": states,
    "lengths": rows,
    "segment_ids": rows,
    "focal_scores": partition.scores,
    "scale": PartitionSpec(),
  }
  if "plan" in operands:
    specs["plan"] = _plan_specs(operands["plan"], partition)
  return partition.shard_map(attend_part, operands, specs, states)


@functools.partial(jax.jit, static_argnames=("partition", "config"))
def _plan_on_mesh(
  operands: dict[str, Any], *, partition: AttentionPartition, config: DGAConfig
) -> GroupPlan:
  specs_of_leaves: list[PartitionSpec] = []
  structure: Any = None

  def plan_part(operands: dict[str, Any]) -> dict[str, list[Array]]:
    nonlocal specs_of_leaves, structure
    query, key = operands["query"], operands["key"]
    B, L = query.shape[:2]
    documents = find_documents(B, L, operands.get("lengths"), operands.get("segment_ids"))
    plan = make_plan(query, key, prepare(documents, config), operands.get("focal_scores"))
    leaves, structure = jax.tree.flatten(plan)
    specs_of_leaves = jax.tree.leaves(_plan_specs(plan, partition))
    return {
      name: [x for x, own in zip(leaves, specs_of_leaves, strict=True) if own == spec]
      for name, spec in out_specs.items()
    }

  states, rows = partition.states, partition.rows
  in_specs = {
    "query": states,
    "key": states,
    "lengths": rows,
    "segment_ids": rows,
    "focal_scores": partition.scores,
  }
  # The structure of a plan is known after tracing: out_specs are a prefix of lists of any length.
  out_specs = {"rows": rows}
  if partition.heads:
    out_specs["row_heads"] = partition.row_heads
  made = partition.shard_map(plan_part, operands, in_specs, out_specs)
  parts = {spec: iter(made[name]) for name, spec in out_specs.items()}
  return jax.tree.unflatten(structure, [next(parts[spec]) for spec in specs_of_leaves])


def _plan_specs(plan: GroupPlan, partition: AttentionPartition) -> PyTree[PartitionSpec]:
  """How each array of a plan is split, in the plan's structure."""
  rows, row_heads = partition.rows, partition.row_heads if partition.heads else partition.rows
  # Under causal streaming selection all heads see the same: ranges have one entry for all heads.
  ranges = row_heads if plan.window_lists_members else rows
  return dataclasses.replace(
    jax.tree.map(lambda _: rows, plan),
    selection=jax.tree.map(lambda _: row_heads, plan.selection),
    layout=jax.tree.map(lambda _: row_heads, plan.layout),
    visibility=jax.tree.map(lambda _: ranges, plan.visibility),
  )


def _present(**arrays: Any) -> dict[str, Any]:
  """The arguments that are given, as arrays."""
  return {
    name: x if isinstance(x, GroupPlan) else jnp.asarray(x)
    for name, x in arrays.items()
    if x is not None
  }


def _with_document_bound(
  config: DGAConfig | HeadBudgets, lengths: IntArray | None, segment_ids: IntArray | None
) -> DGAConfig | HeadBudgets:
  """The config with the number of documents of concrete rows, which jit would hide."""
  count = count_documents(lengths, segment_ids)
  if segment_ids is None or count is None:
    return config

  def bounded[Setting](config: Setting) -> Setting:
    if not isinstance(config, DGAConfig) or config.max_documents is not None:
      return config
    return dataclasses.replace(config, max_documents=max(1, count))

  if isinstance(config, DGAConfig):
    return bounded(config)
  return dataclasses.replace(config, settings=tuple(map(bounded, config.settings)))
