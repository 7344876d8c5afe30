"""Attention of the model on a mesh: each device attends to its own rows and heads."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dga_jax.attention.partition import AttentionPartition
from dga_jax.attention.segments import Documents
from dga_jax.model.attention_kinds.base import AttentionKind
from dga_jax.sharding import constrain, context_axis, current_mesh, current_rules


@runtime_checkable
class SupportsContextParallel(Protocol):
  """An attention kind whose sequences may be split over the context axis."""

  def attend_sharded(
    self,
    q_BxPxHxD: Float[Array, "B P H D"],
    k_BxPxNxD: Float[Array, "B P N D"],
    v_BxPxNxD: Float[Array, "B P N D"],
    metadata: Any,
    *,
    axis_name: str,
    **options: Any,
  ) -> Float[Array, "B P H D"]:
    """As `AttentionKind.attend`, inside a `jax.shard_map`, on one device's part of the sequence.

    Args:
      q_BxPxHxD: queries of this device, in the order of `dga_jax.sharding.zigzag_order`.
      k_BxPxNxD: keys, in the same order.
      v_BxPxNxD: values, in the same order.
      metadata: of the whole sequences, in the order of positions.
      axis_name: the mesh axis that splits sequences.
      options: from `AttentionKind.focal_options`.
    """


def prepare_on_mesh(kind: AttentionKind, documents: Documents) -> Any:
  """`kind.prepare` by rows: every device prepares its own rows.

  The compiler cannot partition the kernels of `prepare`, hence the `jax.shard_map`.

  Raises:
    ValueError: the mesh does not divide the rows.
  """
  mesh = current_mesh()
  if mesh is None:
    return kind.prepare(documents)
  partition = AttentionPartition(mesh, batch=_usable(mesh, current_rules().batch))
  partition.check_divides(rows=documents.index.shape[0], kv_heads=1)
  return partition.shard_map(
    lambda operands: kind.prepare(operands["documents"]),
    {"documents": documents},
    {"documents": partition.rows},
    partition.rows,
    check_vma=False,
  )


def attend_on_mesh(
  kind: AttentionKind,
  q_BxLxHxD: Float[Array, "B L H D"],
  k_BxLxNxD: Float[Array, "B L N D"],
  v_BxLxNxD: Float[Array, "B L N D"],
  metadata: Any,
  layer: Any,
  focal_scores: Float[Array, "B L N"] | None = None,
) -> Float[Array, "B L H D"]:
  """`attend` of a layer on every device of the current mesh, or on one device without a mesh.

  The compiler cannot partition kernels: it would gather their operands. A `jax.shard_map` by the
  rules in force gives each device's kernel the rows and heads of that device. Along mesh axes that
  no rule gives to rows, heads or length, all devices compute the same.

  Args:
    kind: the attention kind.
    q_BxLxHxD: queries. Where a mesh axis splits sequences, queries, keys and values are in the
      order of `dga_jax.sharding.zigzag_order`.
    k_BxLxNxD: keys.
    v_BxLxNxD: values.
    metadata: from `prepare_on_mesh`.
    layer: the argument of `AttentionKind.at_layer`.
    focal_scores: of a layer with a selector, or None; in the order of the keys.

  Raises:
    ValueError: the mesh does not divide heads or rows, or the kind attends to whole sequences only.
  """
  partition = _partition(kind, q_BxLxHxD, k_BxLxNxD)
  options = kind.focal_options(focal_scores)
  if partition is None:
    return kind.at_layer(layer).attend(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, metadata, **options)
  axis_name = context_axis()

  def attend(operands: dict[str, Any]) -> Array:
    q, k, v, metadata = (operands[name] for name in ("q", "k", "v", "metadata"))
    heads = kind.at_layer(operands["layer"])
    if axis_name is None:
      return heads.attend(q, k, v, metadata, **operands["options"])
    assert isinstance(heads, SupportsContextParallel)
    return heads.attend_sharded(q, k, v, metadata, axis_name=axis_name, **operands["options"])

  states = partition.states
  out_BxLxHxD: Array = partition.shard_map(
    attend,
    {
      "q": q_BxLxHxD,
      "k": k_BxLxNxD,
      "v": v_BxLxNxD,
      "options": options,
      "metadata": metadata,
      "layer": layer,
    },
    {
      "q": states,
      "k": states,
      "v": states,
      "options": partition.scores,
      "metadata": partition.rows,
      "layer": PartitionSpec(),
    },
    states,
    # Some kernels of JAX do not tell over which mesh axes their results vary. Only the collectives
    # of context parallelism need the check.
    check_vma=axis_name is not None,
  )
  return out_BxLxHxD


def update_on_mesh(
  kind: AttentionKind,
  update: Callable[..., tuple[Array, Any]],
  q: Float[Array, "B *T H D"],
  k: Float[Array, "B *T N D"],
  v: Float[Array, "B *T N D"],
  caches: Any,
  layer: Any,
  *,
  lengths: Int[Array, "B"] | None = None,
  focal_scores: Float[Array, "B *T N"] | None = None,
) -> tuple[Float[Array, "B *T H D"], Any]:
  """Appends tokens to the cache of a layer on every device of the mesh, or on one without a mesh.

  Each device updates and reads the cache of its own KV heads. All devices compute the same along
  mesh axes that do not split heads, and where `splits_heads` is false.

  Args:
    kind: the attention kind.
    update: its `decode` or its `extend`.
    q: queries of the new tokens; T is absent for `decode`.
    k: keys.
    v: values.
    caches: of all layers.
    layer: the layer argument of `update`.
    lengths: the argument of `extend`.
    focal_scores: of a layer with a selector, or None.
  """
  mesh, N = current_mesh(), k.shape[-2]
  options = kind.focal_options(focal_scores)
  if lengths is not None:
    options["lengths"] = lengths
  if mesh is None:
    return update(q, k, v, caches, layer, **options)
  axes = _usable(mesh, current_rules().heads)
  heads = axes if splits_heads(kind, N, math.prod(mesh.shape[axis] for axis in axes)) else ()
  partition = AttentionPartition(mesh, heads=heads)
  before_heads = [None] * (k.ndim - 2)
  states = PartitionSpec(*before_heads, heads or None, None)
  in_caches = jax.tree.map(lambda x: _cache_spec(kind, x, N, heads), caches)

  def split_states(x: Array) -> Array:
    # Without it, the compiler gathers weights where `update` wants all heads.
    return constrain(x, *before_heads, "heads", None)

  out, updated = partition.shard_map(
    lambda operands: update(
      *operands["states"], operands["caches"], operands["layer"], **operands["options"]
    ),
    {
      "states": tuple(map(split_states, (q, k, v))),
      "caches": caches,
      "layer": layer,
      "options": options,
    },
    {
      "states": states,
      "caches": in_caches,
      "layer": PartitionSpec(),
      "options": {
        name: PartitionSpec(*before_heads, heads or None)
        if name == "focal_scores"
        else PartitionSpec()
        for name in options
      },
    },
    (states, in_caches),
    check_vma=False,
  )
  return split_states(out), updated


def splits_heads(kind: AttentionKind, num_kv_heads: int, parts: int) -> bool:
  """Whether a mesh axis of this size splits the KV heads of a cache.

  Else every device has the whole cache: caches of heads with settings of their own are split where
  all devices have the same settings.
  """
  return num_kv_heads % parts == 0 and kind.has_equal_parts(parts)


def has_heads(kind: AttentionKind, after_rows: Sequence[int], num_kv_heads: int) -> bool:
  """Whether an array of a cache has an axis of KV heads, which then follows that of the rows.

  Args:
    kind: the attention kind. Heads with settings of their own have arrays for the heads of each.
    after_rows: sizes of the array's axes after that of the rows.
    num_kv_heads: of the model.
  """
  return len(after_rows) > 0 and (kind.layers_differ or after_rows[0] == num_kv_heads)


def _cache_spec(
  kind: AttentionKind, x: Array, num_kv_heads: int, heads: tuple[str, ...]
) -> PartitionSpec:
  """How an array of a cache is split: its axes are layers, rows and, in most arrays, KV heads."""
  is_split = has_heads(kind, x.shape[2:], num_kv_heads)
  return PartitionSpec(None, None, heads or None) if is_split else PartitionSpec()


def _partition(
  kind: AttentionKind, q_BxLxHxD: Array, k_BxLxNxD: Array
) -> AttentionPartition | None:
  """The partition by the rules in force; None without a mesh.

  Raises:
    ValueError: the mesh does not divide heads or rows, or the kind attends to whole sequences only.
  """
  mesh, rules = current_mesh(), current_rules()
  if mesh is None:
    return None
  partition = AttentionPartition(
    mesh,
    batch=_usable(mesh, rules.batch),
    heads=_usable(mesh, rules.heads),
    length=next(iter(_usable(mesh, rules.length)), None),
  )
  partition.check_divides(rows=q_BxLxHxD.shape[0], kv_heads=k_BxLxNxD.shape[2])
  axis = context_axis()
  if axis is not None and not isinstance(kind.at_layer(0), SupportsContextParallel):
    raise ValueError(
      f"The mesh axis {axis!r} splits sequences over {mesh.shape[axis]} devices, but "
      f"{type(kind).__name__} attends to whole sequences: the size of this mesh axis must be 1 "
      "(config.mesh.context in training)."
    )
  return partition


def _usable(mesh: AbstractMesh, axes: tuple[str, ...]) -> tuple[str, ...]:
  return tuple(axis for axis in axes if axis in mesh.auto_axes)
