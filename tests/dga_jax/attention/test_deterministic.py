"""The op under --xla_gpu_deterministic_ops, with which training on a GPU repeats bit for bit.

XLA then sorts a scatter's indices as numbers of a flat array, so that one beyond the end of a row
is one of the next row. None of ours may be, unless no two indices are the same: those XLA leaves.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import GatherScatterMode

from dga_jax import DGAConfig
from tests.dga_jax.attention.cases import arrays, CONFIGS, run

SAFE = {GatherScatterMode.CLIP, GatherScatterMode.PROMISE_IN_BOUNDS}


def scatters(jaxpr):
  """All scatters of a program, those of its loops and calls included."""
  for equation in jaxpr.eqns:
    if equation.primitive.name.startswith("scatter"):
      yield equation
    for parameter in jax.tree.leaves(
      equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ):
      inner = getattr(parameter, "jaxpr", parameter)
      if hasattr(inner, "eqns"):
        yield from scatters(inner)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_scatter_reaches_beyond_its_array(name):
  inputs = arrays(0, 2, 41, 4, 2, 4)
  ids = np.repeat([[0, 1, -1]], [20, 16, 5], axis=1).repeat(2, axis=0)

  def op(*inputs):
    return run(*inputs, config=CONFIGS[name], implementation="xla", segment_ids=ids)

  found = list(scatters(jax.make_jaxpr(op)(*inputs).jaxpr))
  assert found
  for equation in found:
    safe = equation.params["unique_indices"] or equation.params["mode"] in SAFE
    assert safe, equation


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("selection", ["streaming", "global"])
@pytest.mark.parametrize(("implementation", "dtype"), [("xla", "float32"), (None, "bfloat16")])
def test_equals_the_op_without_the_flag(selection, implementation, dtype):
  config = DGAConfig(selection=selection, min_focal_tokens=0, max_documents=4)
  rng = np.random.default_rng(0)
  for seed in range(10):
    inputs = arrays(seed, 3, 256, 2, 1, 64, dtype)
    cuts = np.sort(rng.integers(0, 256, size=(3, 3)), axis=1)
    ids = (np.arange(256) >= cuts[..., None]).sum(axis=1)
    ids = np.where(ids == 3, -1, ids)  # the rest is padding

    def op(*inputs, ids=ids):
      return run(*inputs, config=config, implementation=implementation, segment_ids=ids)

    want = jax.jit(op)(*inputs)
    got = jax.jit(op, compiler_options={"xla_gpu_deterministic_ops": True})(*inputs)
    for what, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
      error = jnp.linalg.norm((x - y).astype(jnp.float32)) / jnp.linalg.norm(y)
      assert error < 1e-4, (what, seed, error)
