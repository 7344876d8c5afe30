"""The public op: checks, the mesh, and the call of `dga_jax.attention` on each device's part."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from dga_jax.attention import validation
from dga_jax.attention.attend import attend
from dga_jax.attention.partition import AttentionPartition, find_partition
from dga_jax.attention.plan import GroupPlan
from dga_jax.attention.plan import plan_groups as plan_one_device
from dga_jax.attention.segments import Documents, find_documents
from dga_jax.config import DGAConfig


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
  sharding: NamedSharding | None = None,
  implementation: str | None = None,
) -> Float[Array, "B L H D"]:
  """Causal attention to focal tokens, merged groups and the raw tokens of one open group.

  Zhang et al., ICML 2025 (arXiv 2505.22107), Algorithm 1, masked before the softmax. One softmax
  of query i covers the focal tokens j ≤ i, the groups that end at or before i, each a weighted
  mean of the keys and values of m tokens (Eq. 14), and the raw members of the open group of i.

  On a mesh, rows (B) and heads (H and N alike) may be split, and every device attends to its own
  rows and heads. Explicit mesh axes are found in the types of the arrays. Auto axes are found in
  concrete arrays; under jit, `sharding` names them. Inside a `jax.shard_map` the arrays are one
  device's part. The output is split like the query.

  Args:
    query: any float dtype, the same for all arrays. Softmax statistics are float32.
    key: N KV heads, where N divides H; query head h belongs to KV head ⌊h / (H/N)⌋.
    value: as key.
    config: every switch of the mechanism.
    plan: fixes the split into focal tokens and groups. Default:
      `plan_groups(query, key, config=config, ...)`.
    lengths: tokens of each row; the rest of a row is padding. Default: L.
    segment_ids: runs of equal ids are documents packed in a row; negative ids are padding. Each
      row and document is computed as if it were alone. Padded queries give 0.
    scale: of the attention logits, default 1/√D. The choice of focal tokens always uses 1/√D, and
      `config.aggregation_scale` sets the scale of merge weights.
    sharding: of the query, for a mesh whose axes are Auto: `NamedSharding(mesh,
      PartitionSpec(batch axes, None, head axes))`. Key and value are split alike.
    implementation: None for the fastest that applies, "reference" for the written-out masks, or
      another name that `explain` lists.

  Returns:
    Shape and dtype of the query. Differentiable in query, key and value.

  Raises:
    ValueError: an argument does not fit; the message names the argument and the remedy.
    NotImplementedError: the named implementation cannot compute this call; the message says why.
  """
  validation.query_and_key(query, key)
  validation.value_like_key(value, key)
  validation.softmax_scale(scale)
  validation.implementation(implementation)
  B, L = query.shape[:2]
  validation.rows(B, L, lengths, segment_ids)
  if plan is not None:
    validation.plan_fits(plan, config, query, key, _known_documents(B, L, lengths, segment_ids))
  query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
  partition = find_partition(query, key, value, sharding)
  rows = _present(lengths=lengths, segment_ids=segment_ids)
  if partition is None:
    return attend(
      query,
      key,
      value,
      config=config,
      plan=plan,
      scale=scale,
      implementation=implementation,
      **rows,
    )
  traced_scale = scale if validation.is_traced(scale) else None
  return _attend_on_mesh(
    {
      "query": query,
      "key": key,
      "value": value,
      **rows,
      **_present(plan=plan, scale=traced_scale),
    },
    partition=partition,
    config=config if plan is not None else _with_document_bound(config, L, rows),
    scale=None if scale is None or traced_scale is not None else float(scale),
    implementation=implementation,
  )


def plan_groups(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  *,
  config: DGAConfig,
  lengths: Int[Array, "B"] | None = None,
  segment_ids: Int[Array, "B L"] | None = None,
  sharding: NamedSharding | None = None,
) -> GroupPlan:
  """Chooses focal tokens and groups for every row, document and KV head.

  Global selection ranks keys by the attention that sampled queries pay to them (Eq. 16 and 17 of
  arXiv 2505.22107). Under streaming selection the last query of each block chooses the block's
  focal tokens. Random selection draws them. Each row and document is planned as if it were alone.
  No gradient flows through a plan.

  Args:
    query: any float dtype. Query head h belongs to KV head ⌊h / (H/N)⌋.
    key: same dtype as query.
    config: see `DGAConfig`.
    lengths: tokens of each row; the rest of a row is padding. Default: L.
    segment_ids: runs of equal ids are documents packed in a row; negative ids are padding.
    sharding: of the query, as for `dynamic_group_attention`.

  Returns:
    The plan, whose arrays are split over the mesh as query and key are.

  Raises:
    ValueError: an argument does not fit; the message names the argument and the remedy.
  """
  validation.query_and_key(query, key)
  B, L = query.shape[:2]
  validation.rows(B, L, lengths, segment_ids)
  query, key = jnp.asarray(query), jnp.asarray(key)
  partition = find_partition(query, key, key, sharding)
  rows = _present(lengths=lengths, segment_ids=segment_ids)
  if partition is None:
    return plan_one_device(query, key, config=config, **rows)
  plan = _plan_on_mesh(
    {"query": query, "key": key, **rows},
    partition=partition,
    config=_with_document_bound(config, L, rows),
  )
  return dataclasses.replace(plan, config=config)


@functools.partial(jax.jit, static_argnames=("partition", "config", "scale", "implementation"))
def _attend_on_mesh(
  operands: dict[str, Any],
  *,
  partition: AttentionPartition,
  config: DGAConfig,
  scale: float | None,
  implementation: str | None,
) -> Array:
  def attend_part(operands: dict[str, Any]) -> Array:
    return attend(
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
    plan = plan_one_device(**operands, config=config)
    leaves, structure = jax.tree.flatten(plan)
    specs_of_leaves = jax.tree.leaves(_plan_specs(plan, partition))
    return {
      name: [x for x, own in zip(leaves, specs_of_leaves, strict=True) if own == spec]
      for name, spec in out_specs.items()
    }

  states, rows = partition.states, partition.rows
  in_specs = {"query": states, "key": states, "lengths": rows, "segment_ids": rows}
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
  # Under streaming selection all heads see the same: these ranges have one entry for all heads.
  ranges = rows if plan.config.selection == "streaming" else row_heads
  return dataclasses.replace(
    jax.tree.map(lambda _: rows, plan),
    focal_mask=row_heads,
    focal_index=row_heads,
    member_index=row_heads,
    group_query=row_heads,
    bounds=jax.tree.map(lambda _: ranges, plan.bounds),
  )


def _present(**arrays: Any) -> dict[str, Any]:
  """The arguments that are given, as arrays."""
  return {
    name: x if isinstance(x, GroupPlan) else jnp.asarray(x)
    for name, x in arrays.items()
    if x is not None
  }


def _known_documents(batch: int, length: int, lengths: Any, segment_ids: Any) -> Documents | None:
  """The documents of the rows, read on the host; None without them or where they are traced."""
  rows = _present(lengths=lengths, segment_ids=segment_ids)
  if not rows or any(map(validation.is_traced, rows.values())):
    return None
  host: dict[str, Any] = {name: np.asarray(x) for name, x in rows.items()}
  return find_documents(batch, length, host.get("lengths"), host.get("segment_ids"))


def _with_document_bound(config: DGAConfig, length: int, rows: dict[str, Array]) -> DGAConfig:
  """The config with the number of documents of concrete rows, which jit would hide."""
  segment_ids = rows.get("segment_ids")
  if segment_ids is None or config.max_documents is not None:
    return config
  documents = _known_documents(len(segment_ids), length, rows.get("lengths"), segment_ids)
  if documents is None:
    return config
  bound = validation.document_bound(config, length, documents, segment_ids)
  return dataclasses.replace(config, max_documents=bound)
