"""What the Pallas-Triton kernels of all ops share.

JAX will remove this lowering. Its warning is filtered here, for the files that import this one.
"""

import warnings
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# JAX warns while lowering, long after any function here has returned.
warnings.filterwarnings(
  "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
)


def padded_slice(first: Array | int, size: int) -> pl.Slice:
  """The slice [first, first + size), which may end beyond the array: mask the loads and stores.

  JAX 0.12 refuses such a slice if its start is a Python int, so the start becomes an array.
  """
  return pl.ds(jnp.asarray(first, jnp.int32), size)


def dot(a: Array, b: Array, *, trans_b: bool = False) -> Array:
  """a @ b, or a @ bᵀ, in float32; float32 operands are not rounded to tf32."""
  return lax.dot_general(
    a,
    b,
    (((1,), (1 if trans_b else 0,)), ((), ())),
    precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


def load_rows(
  ref: Any, first: Array | int, block: int, limit: Array | int | None, *, head: Array | None = None
) -> Array:
  """Rows [first, first + block) of a reference [rows, D], or of one head of [rows, heads, D].

  Rows from `limit` on are zeros; None promises that there are none.
  """
  rows = pl.ds(first, block)
  part = ref.at[rows, :] if head is None else ref.at[rows, head, :]
  if limit is None:
    return part[...]
  keep = (first + jnp.arange(block) < limit)[:, None]
  return plgpu.load(part, mask=jnp.broadcast_to(keep, part.shape), other=0)


def online_softmax_step(m_Q: Array, logits2_QxK: Array) -> tuple[Array, Array, Array]:
  """The new running maximum m, the factor alpha = 2^(old m − new m), and p = 2^(logits2 − m).

  One step of FlashAttention's online softmax (Dao et al., 2022) in base 2. Callers update the sum
  l and the accumulator: l ← l · alpha + Σ p, acc ← acc · alpha + p V.
  """
  new_m_Q = jnp.maximum(m_Q, logits2_QxK.max(axis=1))
  p_QxK = jnp.exp2(logits2_QxK - new_m_Q[:, None])
  return new_m_Q, jnp.exp2(m_Q - new_m_Q), p_QxK


def head_refusal(query: Array) -> str | None:
  """Why kernels that hold rows of one head cannot take queries [..., D]; None if they can."""
  D = query.shape[-1]
  if D < 16 or D > 256 or D & (D - 1):
    return f"head_dim is {D}; it must be a power of two from 16 to 256"
  if query.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
    return f"dtype is {query.dtype}; it must be float16, bfloat16 or float32"
  return None
