"""Products with float32 sums in plain XLA."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.target import find_target


def einsum_float32(equation: str, a: Array, b: Array) -> Array:
  """`jnp.einsum` of two arrays of one dtype, with float32 sums and a float32 result.

  On a CPU bfloat16 arrays are converted to float32, which changes no term of the sums. XLA (jax
  0.11.2) compiles some products of bfloat16 arrays with float32 results for CPUs to calls that it
  then refuses to execute ("Unsupported element type for DotThunk::Execute").
  """
  if jnp.bfloat16 in (a.dtype, b.dtype) and find_target(a, b).platform == "cpu":
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
