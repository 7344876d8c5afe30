"""What the Mosaic TPU kernels of all ops share."""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8

# True and False, or how to interpret on a CPU with checks.
Interpret = bool | pltpu.InterpretParams

# The interpreter of the tests: finds missing waits, unwritten scratch and reads outside an array.
CHECKED = pltpu.InterpretParams(
  detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
  """Sums over axis contract[0] of a and contract[1] of b, in float32; float32 stays exact."""
  return lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )
