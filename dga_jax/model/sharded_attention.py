"""Attention over a mesh: each device attends to what it holds, and nothing is gathered for it."""

from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from dga_jax.attention.segments import Documents
from dga_jax.model.attention_kinds.base import AttentionKind
from dga_jax.sharding import ACTIVATIONS, current_mesh


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
  ) -> Float[Array, "B P H D"]:
    """As `AttentionKind.attend`, on this device's shard of the sequences.

    Args:
      q_BxPxHxD: queries of this shard, in the order of `dga_jax.sharding.zigzag_order`.
      k_BxPxNxD: keys.
      v_BxPxNxD: values.
      metadata: of the whole sequences, in their own order.
      axis_name: the mesh axis over which sequences are split.
    """


def prepare_on_mesh(kind: AttentionKind, documents: Documents) -> Any:
  """`kind.prepare` by rows: every device prepares the rows that it holds.

  Kernels that `prepare` runs cannot be partitioned by XLA, hence the `jax.shard_map`.

  Raises:
    ValueError: the mesh does not divide the rows.
  """
  mesh = current_mesh()
  if mesh is None:
    return kind.prepare(documents)
  _check_rows(mesh, documents.index.shape[0])
  rows = PartitionSpec(ACTIVATIONS["batch"])
  # Without collectives there is nothing for check_vma to check.
  prepare = jax.shard_map(kind.prepare, in_specs=rows, out_specs=rows, check_vma=False)
  return prepare(documents)


def attend_on_mesh(
  kind: AttentionKind,
  q_BxLxHxD: Float[Array, "B L H D"],
  k_BxLxNxD: Float[Array, "B L N D"],
  v_BxLxNxD: Float[Array, "B L N D"],
  metadata: Any,
) -> Float[Array, "B L H D"]:
  """`kind.attend` over the current mesh: rows and heads are independent.

  Where the mesh has a context axis, q, k and v are in `dga_jax.sharding.zigzag_order`, and the
  metadata is of the sequences in their own order.

  Args:
    kind: the attention kind.
    q_BxLxHxD: queries.
    k_BxLxNxD: keys.
    v_BxLxNxD: values.
    metadata: from `prepare_on_mesh`.

  Raises:
    ValueError: the mesh does not divide heads or rows, or the kind does not support context
      parallelism.
  """
  mesh = current_mesh()
  if mesh is None:
    return kind.attend(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, metadata)
  _check(mesh, kind, q_BxLxHxD, k_BxLxNxD)

  def attend(q: Array, k: Array, v: Array, metadata: Any) -> Array:
    if mesh.shape["context"] == 1:
      return kind.attend(q, k, v, metadata)
    assert isinstance(kind, SupportsContextParallel)
    return kind.attend_sharded(q, k, v, metadata, axis_name="context")

  batch = ACTIVATIONS["batch"]
  states = PartitionSpec(batch, "context", "tensor", None)
  return jax.shard_map(
    attend,
    in_specs=(states, states, states, PartitionSpec(batch)),
    out_specs=states,
    # Without collectives there is nothing to check, and kernels of JAX's own do not tell over
    # which axes their results vary.
    check_vma=mesh.shape["context"] > 1,
  )(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, metadata)


def _check(mesh: AbstractMesh, kind: AttentionKind, q_BxLxHxD: Array, k_BxLxNxD: Array) -> None:
  B, N, tensor = q_BxLxHxD.shape[0], k_BxLxNxD.shape[2], mesh.shape["tensor"]
  if N % tensor:
    raise ValueError(
      f"config.mesh.tensor is {tensor} and the model has {N} KV heads; it must divide them."
    )
  _check_rows(mesh, B)
  if mesh.shape["context"] > 1 and not isinstance(kind, SupportsContextParallel):
    raise ValueError(
      f"config.mesh.context is {mesh.shape['context']}, but {type(kind).__name__} attends to whole "
      "sequences: it must be 1."
    )


def _check_rows(mesh: AbstractMesh, batch: int) -> None:
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch % rows:
    raise ValueError(
      f"The batch has {batch} rows; config.mesh.data x config.mesh.fsdp, which is {rows}, must "
      "divide them. Fill it up with rows of padding (segment_ids -1)."
    )
