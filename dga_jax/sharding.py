"""Which axis of an array lies on which axis of the mesh: all the rules, in one place.

The mesh has four axes, any of them of size 1:
  data     copies of the parameters, each with its own rows of the batch
  fsdp     rows of the batch too, and the parameters in pieces, gathered where they are used
  tensor   heads, the MLP's inner width and the vocabulary
  context  pieces of the sequence; parameters are stored in pieces over it as well
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Of what is computed. An axis without a rule, such as the residual width, is whole everywhere.
ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  "length": ("context",),
  # Between layers: what is kept there for the backward pass is the most of a step's memory.
  "residual_length": ("context", "tensor"),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
  "vocab": ("tensor",),
}
# Of what is stored: parameters, their gradients and the optimizer's moments.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
  "embed": ("fsdp", "context"),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
  "vocab": ("tensor",),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh's axes; see the module. One of them may be -1: what the others leave.

  Attributes:
    data: copies of the parameters.
    fsdp: pieces of the parameters, and of the batch.
    tensor: pieces of heads, MLP and vocabulary.
    context: pieces of the sequence.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1

  def __post_init__(self) -> None:
    for name in MESH_AXES:
      size = getattr(self, name)
      if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
        raise ValueError(
          f"config.mesh.{name} is {size!r}; it must be a positive integer, or -1 for the devices "
          "that the other axes leave."
        )
    if self.sizes().count(-1) > 1:
      raise ValueError(f"config.mesh is {self}; at most one axis may be -1.")

  def sizes(self, devices: int | None = None) -> tuple[int, ...]:
    """The sizes in the order of MESH_AXES.

    Args:
      devices: how many there are, so that -1 is filled in; None leaves it.

    Raises:
      ValueError: the sizes do not fit that number of devices.
    """
    sizes = tuple(getattr(self, name) for name in MESH_AXES)
    if devices is None:
      return sizes
    given = math.prod(size for size in sizes if size != -1)
    filled = tuple(devices // given if size == -1 else size for size in sizes)
    if math.prod(filled) != devices:
      product = " x ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
      raise ValueError(
        f"config.mesh is {product}; there are {devices} devices, and the sizes must multiply to "
        "that (-1 stands for what the others leave)."
      )
    return filled


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of a config over these devices, by default all of them.

  Raises:
    ValueError: the sizes do not fit the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  grid = mesh_utils.create_device_mesh(
    config.sizes(len(devices)), devices=devices, allow_split_physical_axes=True
  )
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def current_mesh() -> AbstractMesh | None:
  """The mesh that a computation is partitioned over while it is traced.

  None where there is none, where it has a single device or other axes than ours, and inside a
  `jax.shard_map`, where all arrays are pieces already.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes or not set(MESH_AXES) <= set(mesh.axis_names):
    return None
  return mesh


def axis_size(name: str) -> int:
  """Size of an axis of the current mesh, 1 without one."""
  mesh = current_mesh()
  return 1 if mesh is None else mesh.shape[name]


def axis_index_and_size(axis: str) -> tuple[Array | int, int]:
  """Inside a `jax.shard_map`: which part of the arrays split over a mesh axis is here, of how many.

  (0, 1) outside, and where the mesh has no such axis or does not split it.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if axis not in mesh.manual_axes or mesh.shape[axis] == 1:
    return 0, 1
  return jax.lax.axis_index(axis), mesh.shape[axis]


def zigzag_order(length: int) -> np.ndarray | None:
  """Which position stands where in a sequence that is split over the context axis.

  A later query sees more, so contiguous pieces would cost unlike times. The sequence is cut into
  twice as many chunks as there are pieces, and piece c of C holds chunks c and 2C - 1 - c.

  Args:
    length: L, of the sequence.

  Returns:
    int [L], positions in the order of the pieces; None where sequences are whole.

  Raises:
    ValueError: the sequence cannot be cut so.
  """
  pieces = axis_size("context")
  if pieces == 1:
    return None
  if length % (2 * pieces):
    raise ValueError(
      f"The sequence has {length} tokens; with config.mesh.context={pieces} it must be a multiple "
      f"of {2 * pieces}."
    )
  chunks = np.arange(length).reshape(2, pieces, -1)
  return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(length)


def partition_spec(
  names: Sequence[str | None],
  shape: Sequence[int],
  mesh: Mesh | AbstractMesh,
  rules: Mapping[str, tuple[str, ...]],
) -> PartitionSpec:
  """The mesh axes of an array's axes; what the mesh does not divide stays whole.

  Args:
    names: the logical name of each axis, None for one that is never split.
    shape: of the array.
    mesh: its axes of other names are not used.
    rules: ACTIVATIONS or PARAMETERS.
  """

  def split(name: str | None, size: int) -> tuple[str, ...] | str | None:
    taken: tuple[str, ...] = ()
    for axis in rules.get(name or "", ()):
      pieces = math.prod(mesh.shape[other] for other in taken) * mesh.shape.get(axis, 1)
      if mesh.shape.get(axis, 1) > 1 and size % pieces == 0:
        taken = (*taken, axis)
    if len(taken) == 1:
      return taken[0]
    return taken or None

  return PartitionSpec(*(split(name, size) for name, size in zip(names, shape, strict=True)))


def parameter_shardings(variables: nnx.State, mesh: Mesh | AbstractMesh) -> PyTree[NamedSharding]:
  """Where parameters are stored.

  Args:
    variables: the parameters, possibly as shapes, with the names of their axes.
    mesh: where to.

  Returns:
    A nested dict, like the parameters.
  """

  def place(names: PartitionSpec, array: Array | jax.ShapeDtypeStruct) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(tuple(names), array.shape, mesh, PARAMETERS))

  return jax.tree.map(
    place,
    nnx.to_pure_dict(nnx.get_partition_spec(variables)),
    nnx.to_pure_dict(variables),
    is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
  )


def constrain(x: Array, *names: str | None) -> Array:
  """x, laid out over the current mesh by ACTIVATIONS; x itself without a mesh."""
  mesh = current_mesh()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape, mesh, ACTIVATIONS))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fsdp_all_gather(parameter: Array, names: tuple[str, ...]) -> Array:
  """A parameter as it is used: gathered along the axes by which it is only stored in pieces.

  Its gradient goes straight back to the pieces: it is summed and scattered, never whole.
  """
  return constrain(parameter, *names)


def _gather(parameter: Array, names: tuple[str, ...]) -> tuple[Array, None]:
  return fsdp_all_gather(parameter, names), None


def _scatter(names: tuple[str, ...], _: None, gradient: Array) -> tuple[Array]:
  mesh = current_mesh()
  if mesh is None:
    return (gradient,)
  # Whole first, then in pieces: told only of the pieces, the compiler gathers the activations of
  # all devices to compute them, where it can sum and scatter.
  gradient = constrain(gradient, *names)
  stored = partition_spec(names, gradient.shape, mesh, PARAMETERS)
  return (jax.lax.with_sharding_constraint(gradient, stored),)


fsdp_all_gather.defvjp(_gather, _scatter)
