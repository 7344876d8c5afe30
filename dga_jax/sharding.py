"""The sharding rules: which mesh axes split which axis of an array.

The mesh of `make_mesh` has four axes, each of size 1 or more:
  data     copies of the parameters, each with its own rows of the batch
  fsdp     rows of the batch, and parts of the parameters, which are gathered where they are used
  tensor   heads, the MLP width and the vocabulary
  context  parts of the sequence, and parts of the parameters

A mesh with other axis names works with `use_rules`.
"""

import contextlib
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


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """The mesh axes that split each logical axis. Mesh axes that a mesh does not have are ignored.

  The defaults are for the mesh of `make_mesh`. For a mesh with the axes "x" and "y", whose rows are
  split over "x" and whose heads, MLP and vocabulary are split over "y":
  `ShardingRules(batch=("x",), heads=("y",), mlp=("y",), vocab=("y",))`.

  Attributes:
    batch: rows of the batch.
    length: positions of the sequence (context parallelism); one mesh axis at most.
    residual_length: positions of the residual stream between layers. The residual stream that is
      kept for the backward pass is the largest part of a train step's memory.
    heads: query heads and KV heads.
    mlp: width of the MLP.
    vocab: the vocabulary.
    stored_embed: residual width of stored parameters, gradients and optimizer moments (FSDP). The
      residual width of activations, and of parameters in use, is not split.
  """

  batch: tuple[str, ...] = ("data", "fsdp")
  length: tuple[str, ...] = ("context",)
  residual_length: tuple[str, ...] = ("context", "tensor")
  heads: tuple[str, ...] = ("tensor",)
  mlp: tuple[str, ...] = ("tensor",)
  vocab: tuple[str, ...] = ("tensor",)
  stored_embed: tuple[str, ...] = ("fsdp", "context")

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      axes = getattr(self, field.name)
      if not isinstance(axes, tuple) or not all(isinstance(axis, str) for axis in axes):
        raise ValueError(
          f"ShardingRules.{field.name} is {axes!r}; it must be a tuple of names of mesh axes, such "
          'as ("data",) or ().'
        )
    if len(self.length) > 1:
      raise ValueError(f"ShardingRules.length is {self.length}; it may name one mesh axis at most.")

  @property
  def activations(self) -> Mapping[str, tuple[str, ...]]:
    """Mesh axes of the logical axes of activations, and of parameters in use."""
    return {
      "batch": self.batch,
      "length": self.length,
      "residual_length": self.residual_length,
      "heads": self.heads,
      "kv_heads": self.heads,
      "mlp": self.mlp,
      "vocab": self.vocab,
    }

  @property
  def parameters(self) -> Mapping[str, tuple[str, ...]]:
    """Mesh axes of the logical axes of stored parameters, gradients and optimizer moments."""
    return {
      "embed": self.stored_embed,
      "heads": self.heads,
      "kv_heads": self.heads,
      "mlp": self.mlp,
      "vocab": self.vocab,
    }

  def covers(self, axis: str) -> bool:
    """Whether any rule names this mesh axis."""
    return any(axis in getattr(self, field.name) for field in dataclasses.fields(self))


# User contexts are part of the key of jax.jit's cache: other rules trace a function again.
_RULES = jax.make_user_context(ShardingRules())
_HEAD_AXES = jax.make_user_context(())


def use_rules(rules: ShardingRules) -> contextlib.AbstractContextManager[None]:
  """Within this context the model is split over the mesh in force by these rules.

  The rules serve meshes with Auto axes. On Explicit axes the model follows the shardings of its
  parameters and tokens. Mesh axes that no rule names are left to the compiler, except that
  attention kernels compute the same on all devices along such an axis.

  Example:
    rules = ShardingRules(batch=("x",), heads=("y",), mlp=("y",), vocab=("y",))
    with jax.set_mesh(mesh), use_rules(rules):
      logits = nnx.jit(Decoder.__call__)(model, tokens)
  """
  return _RULES(rules)


def current_rules() -> ShardingRules:
  """The rules of the innermost `use_rules`."""
  return _RULES.value


def split_heads(axes: tuple[str, ...]) -> contextlib.AbstractContextManager[None]:
  """Within this context, which a `jax.shard_map` encloses, these mesh axes split the KV heads."""
  return _HEAD_AXES(axes)


def head_part() -> tuple[Array | int, int]:
  """Which part of the KV heads this device has, and how many parts there are: see `split_heads`."""
  axes = _HEAD_AXES.value
  return (jax.lax.axis_index(axes), jax.lax.axis_size(axes)) if axes else (0, 1)


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
  """The mesh in force, over whose Auto axes the compiler partitions the traced computation.

  None without a mesh, and where no Auto axis has more than one device, as inside a `jax.shard_map`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or all(mesh.shape[axis] == 1 for axis in mesh.auto_axes):
    return None
  return mesh


def context_axis() -> str | None:
  """The mesh axis that splits sequences; None where sequences are whole."""
  mesh = current_mesh()
  for axis in current_rules().length:
    if mesh is not None and axis in mesh.auto_axes and mesh.shape[axis] > 1:
      return axis
  return None


def context_size() -> int:
  """The number of devices that share a sequence."""
  mesh, axis = current_mesh(), context_axis()
  return 1 if mesh is None or axis is None else mesh.shape[axis]


def zigzag_order(length: int) -> np.ndarray | None:
  """The order of positions in a sequence that is split over the context axis (zigzag sharding).

  A later query sees more keys, so contiguous parts would have unequal work. The sequence is cut
  into 2C chunks for C devices, and device c holds the chunks c and 2C - 1 - c.

  Args:
    length: L, of the sequence.

  Returns:
    int [L], the position at each place of the split sequence; None where sequences are whole.

  Raises:
    ValueError: 2C does not divide the length.
  """
  devices = context_size()
  if devices == 1:
    return None
  if length % (2 * devices):
    raise ValueError(
      f"The sequence has {length} tokens and the mesh axis {context_axis()!r} splits it over "
      f"{devices} devices; the length must be a multiple of {2 * devices}. Pad the sequence."
    )
  chunks = np.arange(length).reshape(2, devices, -1)
  return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(length)


def partition_spec(
  names: Sequence[str | None],
  shape: Sequence[int],
  mesh: Mesh | AbstractMesh,
  rules: Mapping[str, tuple[str, ...]],
) -> PartitionSpec:
  """The mesh axes that split each axis of an array. An axis that the mesh does not divide is whole.

  Args:
    names: the logical name of each axis; None for an axis that is never split.
    shape: of the array.
    mesh: its Manual axes, and axes that no rule names, are not used.
    rules: `ShardingRules.activations` or `ShardingRules.parameters`.
  """
  manual = mesh.abstract_mesh.manual_axes

  def split(name: str | None, size: int) -> tuple[str, ...] | str | None:
    taken: tuple[str, ...] = ()
    for axis in rules.get(name or "", ()):
      parts = math.prod(mesh.shape[other] for other in taken) * mesh.shape.get(axis, 1)
      if axis not in manual and mesh.shape.get(axis, 1) > 1 and size % parts == 0:
        taken = (*taken, axis)
    if len(taken) == 1:
      return taken[0]
    return taken or None

  return PartitionSpec(*(split(name, size) for name, size in zip(names, shape, strict=True)))


def parameter_shardings(variables: nnx.State, mesh: Mesh | AbstractMesh) -> PyTree[NamedSharding]:
  """The shardings of stored parameters, by the rules in force.

  Args:
    variables: the parameters, or their shapes, with the logical names of their axes.
    mesh: to store them on.

  Returns:
    A nested dict of the structure of the parameters.
  """
  rules = current_rules().parameters

  def sharding(names: PartitionSpec, array: Array | jax.ShapeDtypeStruct) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(tuple(names), array.shape, mesh, rules))

  return jax.tree.map(
    sharding,
    nnx.to_pure_dict(nnx.get_partition_spec(variables)),
    nnx.to_pure_dict(variables),
    is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
  )


def constrain(x: Array, *names: str | None) -> Array:
  """x, split over the current mesh by the rules for activations; x itself without a mesh."""
  rules = current_rules()
  return _constrain(x, names, rules, rules.activations)


def fsdp_all_gather(parameter: Array, names: tuple[str, ...]) -> Array:
  """A stored parameter as it is used: gathered along the axes that only its storage splits.

  Its gradient is reduced and scattered to the stored parts, and is never whole on a device.

  Args:
    parameter: an array that is stored by the rules for parameters.
    names: the logical name of each of its axes.
  """
  return _fsdp_all_gather(parameter, names, current_rules())


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _fsdp_all_gather(parameter: Array, names: tuple[str, ...], rules: ShardingRules) -> Array:
  return _constrain(parameter, names, rules, rules.activations)


def _gather(parameter: Array, names: tuple[str, ...], rules: ShardingRules) -> tuple[Array, None]:
  return _fsdp_all_gather(parameter, names, rules), None


def _scatter(
  names: tuple[str, ...], rules: ShardingRules, _: None, gradient: Array
) -> tuple[Array]:
  # Two constraints: with the second alone, the compiler gathers the activations of all devices to
  # compute the parts. With the first, it sums the gradient and scatters it.
  gradient = _constrain(gradient, names, rules, rules.activations)
  return (_constrain(gradient, names, rules, rules.parameters),)


_fsdp_all_gather.defvjp(_gather, _scatter)


def _constrain(
  x: Array,
  names: Sequence[str | None],
  rules: ShardingRules,
  axes: Mapping[str, tuple[str, ...]],
) -> Array:
  mesh = current_mesh()
  if mesh is None:
    return x
  spec = partition_spec(names, x.shape, mesh, axes)
  if not all(rules.covers(axis) for axis in mesh.auto_axes if mesh.shape[axis] > 1):
    # The compiler may split any axis over a mesh axis that no rule names.
    spec = PartitionSpec(
      *(PartitionSpec.UNCONSTRAINED if entry is None else entry for entry in spec)
    )
  return jax.lax.with_sharding_constraint(x, spec)
