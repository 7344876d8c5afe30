"""What Pallas kernels of all backends share: output shapes and constants of the softmax."""

import math
from typing import Any

import jax
from jax import Array

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)

# The initial running maximum of an online softmax, and the value of a masked logit where −inf is
# not possible. Finite: exp(−inf − MASK_VALUE) is 0 and exp(MASK_VALUE − MASK_VALUE) is 1, where
# an initial −inf would give the NaN of (−inf) − (−inf).
MASK_VALUE = -1e30


def out_struct(x: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
  """The shape of a kernel output; inside a shard_map it varies over the mesh axes of x."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
