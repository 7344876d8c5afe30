"""Meshes of four devices for tests of the op: Auto or Explicit axes, our names or foreign ones."""

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
# Axis names and sizes of each mesh, the axes that split rows, and the axes that split heads.
AXES = {
  "own": (MESH_AXES, (2, 1, 2, 1), ("data", "fsdp"), ("tensor",)),
  "foreign": (("x", "y"), (2, 2), ("x",), ("y",)),
}
MESHES = tuple(itertools.product(AXES, AXIS_TYPES))
DIAGONAL = tuple(zip(AXES, AXIS_TYPES, strict=True))  # Both names and both types, once each.
SPLITS = ("rows", "heads", "both")
SELECTIONS = ("global", "streaming")
CASES = tuple(itertools.product(SPLITS, SELECTIONS))
# The cases for which kernels are lowered or compiled, which takes long. They cover every mesh and
# every case, and on DIAGONAL every split and selection. DGA_ALL_MESH_CASES in the environment
# selects every case on every mesh.
_KERNEL_CASES = {
  ("own", AxisType.Auto): (("both", "global"), ("rows", "streaming")),
  ("own", AxisType.Explicit): (("both", "global"), ("both", "streaming")),
  ("foreign", AxisType.Auto): (("rows", "global"), ("heads", "streaming")),
  ("foreign", AxisType.Explicit): (("heads", "global"), ("both", "streaming")),
}


def kernel_cases(names, axis_type):
  """The (split, selection) cases of a mesh for which kernels are lowered or compiled."""
  return CASES if "DGA_ALL_MESH_CASES" in os.environ else _KERNEL_CASES[names, axis_type]


def make_mesh(names, axis_type, devices=None):
  """A mesh of four devices."""
  axes, sizes, _, _ = AXES[names]
  devices = jax.devices() if devices is None else devices
  return Mesh(np.array(devices).reshape(sizes), axes, axis_types=(axis_type,) * len(axes))


def abstract_mesh(names, axis_type, device=None):
  """An abstract mesh of four devices, for lowering without the hardware."""
  axes, sizes, _, _ = AXES[names]
  types = (axis_type,) * len(axes)
  return AbstractMesh(sizes, axes, axis_types=types, abstract_device=device)


def spec_of(names, split):
  """The PartitionSpec of queries, keys and values.

  On the foreign mesh both axes split the same dimension, unless `split` is "both".
  """
  _, _, rows, heads = AXES[names]
  if names == "foreign" and split != "both":
    rows = heads = (*rows, *heads)
  return PartitionSpec(
    rows if split in ("rows", "both") else None, None, heads if split in ("heads", "both") else None
  )


def op(config, sharding, **options):
  """A function that returns output and gradients; it passes `sharding=` to the op on Auto axes."""
  given = {"sharding": sharding} if sharding.mesh.abstract_mesh.auto_axes else {}

  def run(q, k, v, t):
    def attend(q, k, v):
      return dynamic_group_attention(q, k, v, config=config, **given, **options)

    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(t)

  return run


def make_run(names, mesh, cases):
  """One function that runs all (split, selection) cases, and the shardings of its arguments."""
  shardings = {split: NamedSharding(mesh, spec_of(names, split)) for split, _ in cases}

  def run(arrays):
    return {
      (split, selection): op(CONFIGS[selection], shardings[split])(*arrays[split])
      for split, selection in cases
    }

  return run, shardings


def shapes(shardings, B=4, L=256, H=8, N=4, D=128, dtype=jnp.bfloat16):
  """Shapes of query, key, value and cotangent for each sharding."""
  return {
    split: tuple(
      jax.ShapeDtypeStruct((B, L, heads, D), dtype, sharding=sharding) for heads in (H, N, N, H)
    )
    for split, sharding in shardings.items()
  }
