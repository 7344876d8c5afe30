"""The op on four devices; run by test_mesh.py in a process that has four."""

import jax
import numpy as np

from tests.dga_jax.attention import cases, mesh_cases
from train.hlo_collectives import read_collectives

SHAPE = dict(B=4, L=24, H=8, N=4, D=4)


def equal(got, want, message=""):
  """Gradients differ by the order of sums."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6, err_msg=message)


def check_matrix():
  arrays = cases.arrays(0, **SHAPE)
  want = {
    selection: cases.run(*arrays, config=cases.CONFIGS[selection], implementation=None)
    for selection in mesh_cases.SELECTIONS
  }
  for names in mesh_cases.MESHES:
    for axis_type in mesh_cases.AXIS_TYPES:
      axes, sizes = mesh_cases.axes_of(names)
      mesh = jax.make_mesh(sizes, axes, axis_types=(axis_type,) * len(axes))
      run, shardings = mesh_cases.all_cells(names, mesh)
      placed = {split: jax.device_put(arrays, s) for split, s in shardings.items()}
      program = jax.jit(run).lower(placed).compile()
      assert not read_collectives(program.as_text()), (names, axis_type)
      got = program(placed)
      for (split, selection), outputs in got.items():
        cell = f"{names} {axis_type} {split} {selection}"
        equal(outputs, want[selection], cell)
        for x in outputs:
          assert x.sharding.is_equivalent_to(shardings[split], 4), (cell, x.sharding)


if __name__ == "__main__":
  jax.config.update("jax_numpy_rank_promotion", "raise")
  jax.config.update("jax_disable_most_optimizations", True)
  check_matrix()
