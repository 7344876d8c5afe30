"""Where the training state and the batches lie on the mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from dga_jax.sharding import ACTIVATIONS

type HostBatch = Mapping[str, Shaped[np.ndarray, "B L"]]

# What fills rows of padding; 0 for the others.
_PADDING = {"segment_ids": -1}


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of [B, L] arrays of tokens: rows are split, sequences are whole.

  A token of a batch takes a few bytes, so the devices that share a sequence (context) each hold
  it whole, and take their part while computing.
  """
  return NamedSharding(mesh, PartitionSpec(ACTIVATIONS["batch"]))


def shapes_on(shapes: PyTree[Any], shardings: PyTree[NamedSharding]) -> PyTree[Any]:
  """`jax.ShapeDtypeStruct`s of arrays that lie as the shardings say."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
  )


def optimizer_shardings(
  optimizer: optax.GradientTransformation, params: PyTree[Any], mesh: Mesh
) -> PyTree[NamedSharding]:
  """Of the optimizer's state: what belongs to a parameter lies like it.

  Args:
    optimizer: whose state it is.
    params: shapes of the parameters, with their shardings.
    mesh: the rest, a few scalars, is whole on each of its devices.
  """
  return optax.tree_map_params(
    optimizer,
    lambda _, parameter: parameter.sharding,
    jax.eval_shape(optimizer.init, params),
    params,
    transform_non_params=lambda _: replicated(mesh),
  )


def process_share(mesh: Mesh) -> tuple[int, int]:
  """Which part of every global batch this process reads: (index, of how many).

  Processes whose devices hold the same rows (tensor, context) read the same part.
  """
  pieces = mesh.shape["data"] * mesh.shape["fsdp"]
  places = batch_sharding(mesh).addressable_devices_indices_map((pieces,))
  mine = sorted({place[0].indices(pieces)[0] for place in places.values() if place is not None})
  if mine != list(range(mine[0], mine[0] + len(mine))) or mine[0] % len(mine):
    raise ValueError(
      f"This process's devices hold the parts {mine} of {pieces} of the batch, which are not one "
      "run; choose config.mesh.data and config.mesh.fsdp so that a process holds whole runs."
    )
  return mine[0] // len(mine), pieces // len(mine)


def place_batch(batch: HostBatch, mesh: Mesh, *, micro_batches: int) -> dict[str, Array]:
  """This process's rows of a batch, as its part of global arrays on the mesh.

  Rows of padding, which have no loss, fill the batch up to what the devices and the micro-batches
  divide.

  Args:
    batch: numpy arrays [rows of `process_share`, L].
    mesh: where to.
    micro_batches: how many pieces a step cuts the batch into.
  """
  sharding = batch_sharding(mesh)
  _, shares = process_share(mesh)
  divisor = mesh.shape["data"] * mesh.shape["fsdp"] // shares * micro_batches

  def place(name: str, rows_BxL: np.ndarray) -> Array:
    padding = ((0, -len(rows_BxL) % divisor), (0, 0))
    padded_BxL = np.pad(rows_BxL, padding, constant_values=_PADDING.get(name, 0))
    global_shape = (len(padded_BxL) * shares, padded_BxL.shape[1])
    return jax.make_array_from_process_local_data(sharding, padded_BxL, global_shape)

  return {name: place(name, np.asarray(rows_BxL)) for name, rows_BxL in batch.items()}
