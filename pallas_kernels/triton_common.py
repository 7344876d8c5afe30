"""What the kernels of all ops share that are lowered through Pallas-Triton.

JAX will remove that lowering: its warning is filtered here, for the files that import this one.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

# Raised while lowering, thus long after any function here has returned.
warnings.filterwarnings(
  "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
)


def like(x: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
  """A kernel's output: inside a shard_map it varies over the mesh axes that x varies over."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def padded_slice(first: Array | int, size: int) -> pl.Slice:
  """The slice [first, first + size), which may end beyond the array: mask the loads and stores.

  JAX 0.12 refuses such a slice if its start is a Python int, so the start becomes an array.
  """
  return pl.ds(jnp.asarray(first, jnp.int32), size)


def dot(a: Array, b: Array, *, trans_b: bool = False) -> Array:
  """a @ b in float32; float32 operands are not rounded to tf32."""
  return lax.dot_general(
    a,
    b,
    (((1,), (1 if trans_b else 0,)), ((), ())),
    precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


def head_refusal(query: Array) -> str | None:
  """Why kernels that hold rows of one head cannot take queries [..., D]; None if they can."""
  D = query.shape[-1]
  if D < 16 or D > 256 or D & (D - 1):
    return f"head_dim is {D}; it must be a power of two from 16 to 256"
  if query.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
    return f"dtype is {query.dtype}; it must be float16, bfloat16 or float32"
  return None
