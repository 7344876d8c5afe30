"""Which mesh axes split the rows and the heads of a call, and the `jax.shard_map` over them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from dga_jax.sharding import split_heads
from pallas_kernels.dispatch import find_target

# The mesh axes that split each axis of a [batch, length, heads, head_dim] array.
type _Layout = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class AttentionPartition:
  """The mesh axes that split rows, and those that split query heads and KV heads alike.

  Attributes:
    mesh: the devices.
    batch: mesh axes that split rows.
    heads: mesh axes that split heads.
    length: mesh axis that splits sequences (context parallelism); None for whole sequences.
    manual: mesh axes that `shard_map` covers; empty for all of the mesh.
  """

  mesh: Mesh | AbstractMesh
  batch: tuple[str, ...] = ()
  heads: tuple[str, ...] = ()
  length: str | None = None
  manual: frozenset[str] = frozenset()

  @property
  def states(self) -> PartitionSpec:
    """How [B, L, heads, D] arrays are split."""
    return PartitionSpec(_entry(self.batch), self.length, _entry(self.heads), None)

  @property
  def scores(self) -> PartitionSpec:
    """How [B, L, heads] arrays are split."""
    return PartitionSpec(_entry(self.batch), self.length, _entry(self.heads))

  @property
  def rows(self) -> PartitionSpec:
    """How arrays [B, ...] that all heads share are split."""
    return PartitionSpec(_entry(self.batch))

  @property
  def row_heads(self) -> PartitionSpec:
    """How arrays [B, N, ...] with an entry for each KV head are split."""
    return PartitionSpec(_entry(self.batch), _entry(self.heads))

  def check_divides(self, *, rows: int, kv_heads: int) -> None:
    """Raises a ValueError if the mesh axes do not divide the rows or the KV heads."""
    row_parts, head_parts = self._size(self.batch), self._size(self.heads)
    if rows % row_parts:
      raise ValueError(
        f"The batch has {rows} rows and the mesh axes {self.batch} split them into {row_parts} "
        "parts, which must divide their number. Fill the batch up with rows of padding (lengths 0, "
        "or segment_ids -1)."
      )
    if kv_heads % head_parts:
      raise ValueError(
        f"key and value have {kv_heads} KV heads and the mesh axes {self.heads} split heads into "
        f"{head_parts} parts, which must divide the number of KV heads. Split heads over fewer "
        "devices, and rows over the other mesh axes."
      )

  def shard_map(
    self,
    function: Callable[[Any], Any],
    operands: Mapping[str, PyTree[Array]],
    in_specs: Mapping[str, PyTree[PartitionSpec]],
    out_specs: PyTree[PartitionSpec],
    *,
    check_vma: bool = True,
  ) -> Any:
    """Calls `function` on every device with that device's part of the operands.

    Args:
      function: takes the operands as one dict.
      operands: arrays, or pytrees of arrays, by name.
      in_specs: how each operand is split; for a pytree, a prefix of it. Names without an operand
        are ignored.
      out_specs: how the results are put together.
      check_vma: as for `jax.shard_map`.

    Raises:
      ValueError: a `jax.vmap` around the call maps an axis that Explicit mesh axes split.
    """
    in_specs = {name: in_specs[name] for name in operands}
    if self.mesh.abstract_mesh.explicit_axes:
      operands = jax.tree.map(self._reshard, in_specs, operands)
    return jax.shard_map(
      self._on_device(function),
      mesh=self.mesh,
      in_specs=(in_specs,),
      out_specs=out_specs,
      axis_names=self.manual,
      check_vma=check_vma,
    )(operands)

  def _reshard(self, spec: PartitionSpec, operand: PyTree[Array]) -> PyTree[Array]:
    """Explicit axes are part of an array's type, and `jax.shard_map` takes no other layout."""
    spec = _only(spec, self.mesh.abstract_mesh.explicit_axes)
    sharding = NamedSharding(self.mesh, spec)
    return jax.tree.map(lambda x: jax.sharding.reshard(x, sharding), operand)

  def _on_device(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def checked(operands: Any) -> Any:
      # jax.shard_map leaves out the mesh axes of a jax.vmap around it.
      mapped = () if self.manual else jax.sharding.get_abstract_mesh().explicit_axes
      if mapped:
        raise ValueError(
          f"jax.vmap maps an axis of query, key and value that the Explicit mesh axes {mapped} "
          "split. Make that axis a part of the batch axis B of the call instead, or map an axis "
          "that is not split."
        )
      with split_heads(self.heads):
        return function(operands)

    return checked

  def _size(self, axes: tuple[str, ...]) -> int:
    return math.prod(self.mesh.shape[axis] for axis in axes)


def find_partition(
  query: Array, key: Array, value: Array, sharding: NamedSharding | None
) -> AttentionPartition | None:
  """How a call is split: from the types of its arrays, from their devices, or from `sharding`.

  An Explicit mesh axis is part of an array's type. How an Auto axis splits an array is known for
  concrete arrays, and from `sharding`. Manual axes belong to a `jax.shard_map` around the call,
  inside which an array already is one device's part.

  Args:
    query: [B, L, H, D].
    key: [B, L, N, D].
    value: as key.
    sharding: of the query. Keys and values are split alike.

  Returns:
    The partition. None if no mesh axis is left to split the call, and on CPUs for arrays that Auto
    axes split in an unknown way: without kernels, XLA partitions the call.

  Raises:
    ValueError: the mesh or the layout of an array does not fit; the message names the remedy.
  """
  arrays = {"query": query, "key": key, "value": value}
  mesh = _find_mesh(arrays, sharding)
  if mesh is None:
    return None
  axes = mesh.abstract_mesh
  explicit = axes.explicit_axes
  auto = tuple(axis for axis in axes.auto_axes if axes.shape[axis] > 1)
  if not explicit and not auto:
    return None
  manual: frozenset[str] = frozenset()
  if sharding is not None:
    _check_sharding(sharding, arrays, axes)
  elif auto and not all(map(_is_concrete, arrays.values())):
    _check_no_kernels(query, auto)
    if not explicit:
      return None
    manual = frozenset(explicit)
  layouts = {name: _layout(x, sharding) for name, x in arrays.items()}
  known = {name: layout for name, layout in layouts.items() if layout is not None}
  if not known:
    return None
  _check_layouts(known, arrays)
  batch, _, heads, _ = next(iter(known.values()))
  partition = AttentionPartition(mesh, batch, heads, manual=manual)
  partition.check_divides(rows=query.shape[0], kv_heads=key.shape[2])
  return partition


def _find_mesh(
  arrays: Mapping[str, Array], sharding: NamedSharding | None
) -> Mesh | AbstractMesh | None:
  """The mesh in force, else that of `sharding`, else that of the arrays. They must agree."""
  if sharding is not None and not isinstance(sharding, NamedSharding):
    raise ValueError(f"sharding is {sharding!r}; it must be a jax.sharding.NamedSharding or None.")
  meshes = {
    "the mesh in force": jax.sharding.get_abstract_mesh(),
    "sharding": None if sharding is None else sharding.mesh,
    **{name: _mesh_of(x) for name, x in arrays.items()},
  }
  found = [(name, mesh) for name, mesh in meshes.items() if mesh is not None and not mesh.empty]
  if not found:
    return None
  first, mesh = found[0]
  for name, other in found[1:]:
    if dict(other.shape) != dict(mesh.shape):
      raise ValueError(
        f"{name} has the mesh axes {dict(other.shape)} and {first} {dict(mesh.shape)}; all must "
        "have the same mesh."
      )
  return mesh


def _mesh_of(x: Array) -> Mesh | AbstractMesh | None:
  if _is_concrete(x):
    return x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None
  return jax.typeof(x).sharding.mesh


def _check_sharding(
  sharding: NamedSharding, arrays: Mapping[str, Array], mesh: AbstractMesh
) -> None:
  """`sharding` covers the query, leaves out Manual axes and agrees with types on Explicit ones."""
  spec = sharding.spec
  if len(spec) > 4 or PartitionSpec.UNCONSTRAINED in spec:
    raise ValueError(
      f"sharding is {spec}; it must name the mesh axes, or None, of the query's 4 axes at most."
    )
  if any(_axes(_only(spec, mesh.manual_axes))):
    raise ValueError(
      f"sharding is {spec}; the arrays are split already over {mesh.manual_axes}, the axes of the "
      "jax.shard_map around the call. Leave these mesh axes out."
    )
  for name, x in arrays.items():
    typed = jax.typeof(x).sharding
    given = _axes(_only(spec, mesh.explicit_axes))
    if not typed.mesh.empty and _axes(_only(typed.spec, mesh.explicit_axes)) != given:
      raise ValueError(
        f"sharding is {spec} and the type of {name} says {typed.spec}. Explicit mesh axes need no "
        "sharding argument: leave it out, or change the array with jax.sharding.reshard."
      )


def _check_no_kernels(query: Array, auto: tuple[str, ...]) -> None:
  target = find_target(query)
  if target.platform != "cpu":
    raise ValueError(
      f"How the mesh axes {auto} split query is unknown: under jit the type of an array does not "
      f"say so for Auto axes, and the compiler cannot partition the kernels for {target}. Pass "
      "sharding=NamedSharding(mesh, PartitionSpec(batch axes, None, head axes)), or make the mesh "
      "with Explicit axes, the default of jax.make_mesh."
    )


def _layout(x: Array, sharding: NamedSharding | None) -> _Layout | None:
  """Of an array's four axes; None for an array that is on no mesh."""
  if sharding is not None:
    return _axes(sharding.spec)
  own = x.sharding if _is_concrete(x) else jax.typeof(x).sharding
  return _axes(own.spec) if isinstance(own, NamedSharding) and not own.mesh.empty else None


def _check_layouts(layouts: Mapping[str, _Layout], arrays: Mapping[str, Array]) -> None:
  """Rows and heads are split alike in all arrays, length and head_dim in none."""
  for name, (_, length, _, head_dim) in layouts.items():
    if length:
      raise ValueError(
        f"{name} {list(arrays[name].shape)} is split along its length over the mesh axes {length}, "
        "and the op attends to whole sequences. Gather it with jax.sharding.reshard, or use the "
        "context parallelism of dga_jax.model.Decoder (dga_jax.sharding.ShardingRules.length)."
      )
    if head_dim:
      raise ValueError(
        f"{name} {list(arrays[name].shape)} is split along head_dim over the mesh axes {head_dim}; "
        "only rows and heads may be split. Use jax.sharding.reshard."
      )
  first, (batch, _, heads, _) = next(iter(layouts.items()))
  for name, layout in layouts.items():
    if (layout[0], layout[2]) != (batch, heads):
      raise ValueError(
        f"{first} has rows split over {batch} and heads over {heads}, and {name} over {layout[0]} "
        f"and {layout[2]}; query, key and value must be split alike. Use jax.sharding.reshard. "
        "Heads may be split over mesh axes whose size divides the number of KV heads."
      )


def _is_concrete(x: Array) -> bool:
  return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)


def _axes(spec: PartitionSpec) -> _Layout:
  named = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
  return (*named, *[()] * (4 - len(named)))


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
  return axes[0] if len(axes) == 1 else axes or None


def _only(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
  """The spec without mesh axes other than these."""
  kept = [_entry(tuple(axis for axis in named if axis in axes)) for named in _axes(spec)]
  return PartitionSpec(*kept[: len(spec)])
