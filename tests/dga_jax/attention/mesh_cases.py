"""The op on meshes of four devices: Auto and Explicit axes, any names, rows and heads split."""

import itertools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dga_jax import dynamic_group_attention
from dga_jax.sharding import MESH_AXES
from tests.dga_jax.attention.cases import CONFIGS

AXIS_TYPES = (AxisType.Auto, AxisType.Explicit)
# Names and sizes of a mesh's axes, and which of its axes split rows and heads.
MESHES = {
  "own": ((MESH_AXES, (2, 1, 2, 1)), ("data", "fsdp"), ("tensor",)),
  "foreign": ((("x", "y"), (2, 2)), ("x",), ("y",)),
}
SPLITS = ("rows", "heads", "both")
SELECTIONS = ("global", "streaming")
CELLS = tuple(itertools.product(SPLITS, SELECTIONS))


def axes_of(names):
  """Names, sizes."""
  return MESHES[names][0]


def spec_of(names, split):
  """The layout of queries, keys and values. Foreign axes split one axis of an array together."""
  _, rows, heads = MESHES[names]
  if names == "foreign" and split != "both":
    rows = heads = (*rows, *heads)
  return PartitionSpec(
    rows if split in ("rows", "both") else None, None, heads if split in ("heads", "both") else None
  )


def abstract(names, axis_type, device=None):
  """A mesh of devices that are described, and need not be there."""
  axes, sizes = axes_of(names)
  types = (axis_type,) * len(axes)
  return AbstractMesh(sizes, axes, axis_types=types, abstract_device=device)


def op(config, sharding, **options):
  """Output and gradients of an op whose `sharding` is given where axes are Auto."""
  auto = sharding.mesh.abstract_mesh.auto_axes
  given = {"sharding": sharding} if auto else {}

  def run(q, k, v, t):
    def attend(q, k, v):
      return dynamic_group_attention(q, k, v, config=config, **given, **options)

    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(t)

  return run


def all_cells(names, mesh, **options):
  """One function for every split and selection on a mesh, and its arguments' shardings."""
  shardings = {split: NamedSharding(mesh, spec_of(names, split)) for split in SPLITS}

  def run(arrays):
    return {
      cell: op(CONFIGS[cell[1]], shardings[cell[0]], **options)(*arrays[cell[0]]) for cell in CELLS
    }

  return run, shardings


def shapes(sharding, B, L, H, N, D, dtype=jnp.bfloat16):
  """Of a query, key, value and cotangent."""
  return tuple(
    jax.ShapeDtypeStruct((B, L, heads, D), dtype, sharding=sharding) for heads in (H, N, N, H)
  )
