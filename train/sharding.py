"""Shardings of the training state and of the batches."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from dga_jax.sharding import ShardingRules

type HostBatch = Mapping[str, Shaped[np.ndarray, "B L"]]

# Values of padding rows, by array; 0 for arrays without an entry.
_PADDING = {"segment_ids": -1}


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of [B, L] arrays of tokens: rows are split, sequences are whole.

  A token of a batch takes a few bytes. The devices that share a sequence (context) each hold all
  of it, and take their part inside the computation.
  """
  return NamedSharding(mesh, PartitionSpec(ShardingRules().batch))


def shapes_on(shapes: PyTree[Any], shardings: PyTree[NamedSharding]) -> PyTree[Any]:
  """`jax.ShapeDtypeStruct`s with these shapes, dtypes and shardings."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
  )


def optimizer_shardings(
  optimizer: optax.GradientTransformation, params: PyTree[Any], mesh: Mesh
) -> PyTree[NamedSharding]:
  """Shardings of the optimizer state: a parameter's moments have the parameter's sharding.

  Args:
    optimizer: the optimizer of the state.
    params: shapes of the parameters, with their shardings.
    mesh: the devices. The rest of the state, a few scalars, is replicated.
  """
  return optax.tree_map_params(
    optimizer,
    lambda _, parameter: parameter.sharding,
    jax.eval_shape(optimizer.init, params),
    params,
    transform_non_params=lambda _: replicated(mesh),
  )


def process_share(mesh: Mesh) -> tuple[int, int]:
  """The part of every global batch that this process reads: (index, number of parts).

  Processes whose devices hold the same rows (tensor, context) read the same part.

  Raises:
    ValueError: the rows of this process's devices are not contiguous in the global batch.
  """
  parts = _row_parts(mesh)
  indices = batch_sharding(mesh).addressable_devices_indices_map((parts,))
  mine = sorted({index[0].indices(parts)[0] for index in indices.values() if index is not None})
  if mine != list(range(mine[0], mine[0] + len(mine))) or mine[0] % len(mine):
    raise ValueError(
      f"The devices of this process hold the parts {mine} of {parts} of the batch, which are not "
      "contiguous. Choose config.mesh.data and config.mesh.fsdp so that they are."
    )
  return mine[0] // len(mine), parts // len(mine)


def shard_batch(batch: HostBatch, mesh: Mesh, *, micro_batches: int) -> dict[str, Array]:
  """Puts this process's rows of a batch on its devices, as a part of global arrays on the mesh.

  Padding rows, which have no loss, fill the batch up to a multiple of devices and micro-batches.

  Args:
    batch: numpy arrays [rows of `process_share`, L].
    mesh: the devices.
    micro_batches: the number of micro-batches of a step.
  """
  sharding = batch_sharding(mesh)
  _, shares = process_share(mesh)
  divisor = _row_parts(mesh) // shares * micro_batches

  def shard(name: str, rows_BxL: np.ndarray) -> Array:
    padding = ((0, -len(rows_BxL) % divisor), (0, 0))
    padded_BxL = np.pad(rows_BxL, padding, constant_values=_PADDING.get(name, 0))
    global_shape = (len(padded_BxL) * shares, padded_BxL.shape[1])
    return jax.make_array_from_process_local_data(sharding, padded_BxL, global_shape)

  return {name: shard(name, np.asarray(rows_BxL)) for name, rows_BxL in batch.items()}


def _row_parts(mesh: Mesh) -> int:
  """The number of parts into which the mesh splits the rows of a batch."""
  return math.prod(mesh.shape[axis] for axis in ShardingRules().batch)
