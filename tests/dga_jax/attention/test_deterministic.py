"""The op under --xla_gpu_deterministic_ops, with which training on a GPU repeats bit for bit.

XLA (jax 0.11.2) then sorts the indices of a scatter of single numbers as places in a flat array, so
that one beyond the end of a row becomes one of the next row. It leaves a scatter alone that
promises not to repeat an index, and does not err where it scatters rows.
"""

import jax
import numpy as np
import pytest
from jax.extend.core import subjaxprs
from jax.lax import GatherScatterMode

from tests.dga_jax.attention.cases import arrays, CONFIGS, run

SAFE = {GatherScatterMode.CLIP, GatherScatterMode.PROMISE_IN_BOUNDS}


def scatters(jaxpr):
  """All scatters of a program, those of its loops and calls included."""
  for equation in jaxpr.eqns:
    if equation.primitive.name.startswith("scatter"):
      yield equation
  for inner in subjaxprs(jaxpr):
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
    moves_rows = equation.params["dimension_numbers"].update_window_dims
    promises = equation.params["unique_indices"] or equation.params["mode"] in SAFE
    assert moves_rows or promises, equation
