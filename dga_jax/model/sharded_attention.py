"""Attention over a mesh: each device attends to what it holds, and nothing is gathered for it."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dga_jax.model.attention_kinds import AttentionKind
from dga_jax.sharding import ACTIVATIONS, current_mesh


@runtime_checkable
class SupportsContextParallel(Protocol):
  """An attention kind whose sequences may be split over the context axis."""

  def attend_sharded(
    self,
    q_BxPxHxD: Float[Array, "B P H D"],
    k_BxPxNxD: Float[Array, "B P N D"],
    v_BxPxNxD: Float[Array, "B P N D"],
    *,
    segment_ids: Int[Array, "B L"] | None,
    lengths: Int[Array, "B"] | None,
    axis_name: str,
  ) -> Float[Array, "B P H D"]:
    """As `AttentionKind.attend`, on one device's piece of the sequence.

    Args:
      q_BxPxHxD: queries of this piece, in the order of `dga_jax.sharding.zigzag_order`.
      k_BxPxNxD: keys.
      v_BxPxNxD: values.
      segment_ids: of the whole sequence, in its own order.
      lengths: of the whole sequence.
      axis_name: of the mesh, over which sequences are split.
    """


def attend_on_mesh(
  kind: AttentionKind,
  q_BxLxHxD: Float[Array, "B L H D"],
  k_BxLxNxD: Float[Array, "B L N D"],
  v_BxLxNxD: Float[Array, "B L N D"],
  *,
  segment_ids: Int[Array, "B L"] | None,
  lengths: Int[Array, "B"] | None,
) -> Float[Array, "B L H D"]:
  """`kind.attend` on every device of the current mesh; the same as that without a mesh.

  A kernel is opaque to the compiler, which would gather its operands. So rows are split over data
  and fsdp, heads over tensor, and the kernel sees its device's rows and heads alone. Where the
  mesh has a context axis, q, k and v stand in `dga_jax.sharding.zigzag_order`, segment_ids and
  lengths are those of the sequences in their own order.

  Raises:
    ValueError: the mesh does not divide heads, rows or sequences, or the kind cannot be split.
  """
  mesh = current_mesh()
  if mesh is None:
    return kind.attend(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, segment_ids=segment_ids, lengths=lengths)
  _check(mesh, kind, q_BxLxHxD, k_BxLxNxD)
  rows = {
    name: array
    for name, array in (("segment_ids", segment_ids), ("lengths", lengths))
    if array is not None
  }

  def attend(q: Array, k: Array, v: Array, rows: Mapping[str, Array]) -> Array:
    given: dict[str, Any] = {"segment_ids": None, "lengths": None, **rows}
    if mesh.shape["context"] == 1:
      return kind.attend(q, k, v, **given)
    assert isinstance(kind, SupportsContextParallel)
    return kind.attend_sharded(q, k, v, **given, axis_name="context")

  batch = ACTIVATIONS["batch"]
  states = PartitionSpec(batch, "context", "tensor", None)
  return jax.shard_map(
    attend,
    in_specs=(states, states, states, PartitionSpec(batch)),
    out_specs=states,
    # Without collectives there is nothing to check, and kernels of JAX's own do not tell over
    # which axes their results vary.
    check_vma=mesh.shape["context"] > 1,
  )(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, rows)


def _check(mesh: AbstractMesh, kind: AttentionKind, q_BxLxHxD: Array, k_BxLxNxD: Array) -> None:
  B, N = q_BxLxHxD.shape[0], k_BxLxNxD.shape[2]
  tensor, rows = mesh.shape["tensor"], mesh.shape["data"] * mesh.shape["fsdp"]
  if N % tensor:
    raise ValueError(
      f"config.mesh.tensor is {tensor} and the model has {N} KV heads; it must divide them."
    )
  if B % rows:
    raise ValueError(
      f"The batch has {B} rows; config.mesh.data x config.mesh.fsdp, which is {rows}, must divide "
      "them. Fill it up with rows of padding (segment_ids -1)."
    )
  if mesh.shape["context"] > 1 and not isinstance(kind, SupportsContextParallel):
    raise ValueError(
      f"config.mesh.context is {mesh.shape['context']}, but {type(kind).__name__} attends to whole "
      "sequences: it must be 1."
    )
