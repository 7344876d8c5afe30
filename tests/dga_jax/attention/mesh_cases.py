"""The op on meshes of four devices: Auto and Explicit axes, any names, rows and heads split."""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dga_jax import dynamic_group_attention
from dga_jax.sharding import MESH_AXES
from tests.dga_jax.attention.cases import CONFIGS

AXIS_TYPES = (AxisType.Auto, AxisType.Explicit)
# Names and sizes of a mesh's axes, and the axes that split rows and heads.
AXES = {
  "own": (MESH_AXES, (2, 1, 2, 1), ("data", "fsdp"), ("tensor",)),
  "foreign": (("x", "y"), (2, 2), ("x",), ("y",)),
}
MESHES = tuple(itertools.product(AXES, AXIS_TYPES))
SPLITS = ("rows", "heads", "both")
SELECTIONS = ("global", "streaming")
CELLS = tuple(itertools.product(SPLITS, SELECTIONS))
# Kernels take long to lower and to compile. Of them every mesh and every cell is tested, but not
# every cell on every mesh, unless DGA_ALL_MESH_CELLS is set.
_KERNEL_CELLS = {
  ("own", AxisType.Auto): (("both", "global"), ("rows", "streaming")),
  ("own", AxisType.Explicit): (("heads", "global"), ("both", "streaming")),
  ("foreign", AxisType.Auto): (("rows", "global"), ("heads", "streaming")),
  ("foreign", AxisType.Explicit): (("both", "global"), ("both", "streaming")),
}


def kernel_cells(names, axis_type):
  """The cells of a mesh for which kernels are lowered or compiled."""
  return CELLS if "DGA_ALL_MESH_CELLS" in os.environ else _KERNEL_CELLS[names, axis_type]


def make_mesh(names, axis_type, devices=None):
  """Of four devices."""
  axes, sizes, _, _ = AXES[names]
  devices = jax.devices() if devices is None else devices
  return Mesh(np.array(devices).reshape(sizes), axes, axis_types=(axis_type,) * len(axes))


def abstract_mesh(names, axis_type, device=None):
  """Of four devices that are described and absent."""
  axes, sizes, _, _ = AXES[names]
  types = (axis_type,) * len(axes)
  return AbstractMesh(sizes, axes, axis_types=types, abstract_device=device)


def spec_of(names, split):
  """The layout of queries, keys and values. Both foreign axes split rows, or heads, together."""
  _, _, rows, heads = AXES[names]
  if names == "foreign" and split != "both":
    rows = heads = (*rows, *heads)
  return PartitionSpec(
    rows if split in ("rows", "both") else None, None, heads if split in ("heads", "both") else None
  )


def op(config, sharding, **options):
  """Output and gradients. The op is told the `sharding` where axes are Auto."""
  given = {"sharding": sharding} if sharding.mesh.abstract_mesh.auto_axes else {}

  def run(q, k, v, t):
    def attend(q, k, v):
      return dynamic_group_attention(q, k, v, config=config, **given, **options)

    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(t)

  return run


def many_cells(names, mesh, cells):
  """One function for several splits and selections, and the shardings of its arguments."""
  shardings = {split: NamedSharding(mesh, spec_of(names, split)) for split, _ in cells}

  def run(arrays):
    return {
      (split, selection): op(CONFIGS[selection], shardings[split])(*arrays[split])
      for split, selection in cells
    }

  return run, shardings


def shapes(shardings, B=4, L=256, H=8, N=4, D=128, dtype=jnp.bfloat16):
  """Query, key, value and cotangent for each sharding."""
  return {
    split: tuple(
      jax.ShapeDtypeStruct((B, L, heads, D), dtype, sharding=sharding) for heads in (H, N, N, H)
    )
    for split, sharding in shardings.items()
  }
