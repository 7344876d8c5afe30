"""What the Mosaic TPU kernels of all ops share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8

# True and False, or how to interpret on a CPU with checks.
Interpret = bool | pltpu.InterpretParams

# What tests interpret with: finds missing waits, scratch nobody wrote, and reads outside an array.
CHECKED = pltpu.InterpretParams(
  detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


def like(x: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
  """A kernel's output: inside a shard_map it varies over the mesh axes that x varies over."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
  """The matrix product over axis contract[0] of a and contract[1] of b, float32; float32 exact."""
  return lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )
