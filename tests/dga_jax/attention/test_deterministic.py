"""The op contains no scatter that XLA miscompiles under --xla_gpu_deterministic_ops.

Bit-for-bit training on a GPU needs that flag. With it XLA (jax 0.11.2) sorts the indices of a
scalar scatter as offsets in the flattened array. An index beyond the end of a row then writes to
the next row. Scatters with unique_indices and scatters of whole rows are not affected.
"""

import jax
import numpy as np
import pytest
from jax.extend.core import subjaxprs
from jax.lax import GatherScatterMode

from tests.dga_jax.attention.cases import arrays, CONFIGS, run

SAFE = {GatherScatterMode.CLIP, GatherScatterMode.PROMISE_IN_BOUNDS}


def scatters(jaxpr):
  """All scatter equations of a jaxpr, including those in loops and calls."""
  for equation in jaxpr.eqns:
    if equation.primitive.name.startswith("scatter"):
      yield equation
  for inner in subjaxprs(jaxpr):
    yield from scatters(inner)


@pytest.mark.parametrize("name", CONFIGS)
def test_scalar_scatters_are_unique_or_in_bounds(name):
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
