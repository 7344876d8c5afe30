"""Forward kernel of grouped attention in Triton, called through jax_triton.

It shows the replacement of the Pallas-Triton lowering, which JAX will remove: the same tiles as in
`triton_forward.py`, with pointer arithmetic in place of block specs. It has no backward pass.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl
from jax import Array
from jaxtyping import Float

from pallas_kernels.dispatch import find_target, refuse
from pallas_kernels.grouped_attention.block_sizes import triton_blocks
from pallas_kernels.grouped_attention.kv_sources import HeadOrder, KVSources
from pallas_kernels.kernel_common import LOG2_E


def grouped_attention_jax_triton(
  query: Float[Array, "B L H D"],
  sources: KVSources,
  *,
  scale: float,
  group_bias: float,
  max_window: int,
  head_order: HeadOrder | None = None,
) -> Float[Array, "B L H D"]:
  """See `grouped_attention`.

  Raises:
    NotImplementedError: for the reasons of `refusal`, and if it is differentiated.
  """
  del head_order, max_window
  refuse(refusal(query, sources))
  return _forward(scale, group_bias, query, sources)


def refusal(query: Array, sources: KVSources, **_: Any) -> str | None:
  """Why this kernel cannot run a call of `grouped_attention`; None if it can."""
  D = query.shape[-1]
  if D < 16 or D & (D - 1):
    return f"head_dim is {D}; it must be a power of two, 16 or more"
  if query.dtype not in (jnp.float16, jnp.bfloat16):
    return f"dtype is {query.dtype}; it must be float16 or bfloat16"
  for name, source in zip(sources._fields, sources, strict=True):
    if source.key.shape[1] == 0:
      return f"sources.{name} has no tokens; it must have at least one"
  return None


def _call(scale: float, group_bias: float, query: Array, sources: KVSources) -> Array:
  B, L, H, D = query.shape
  r, k, w = (source.key.shape[1] for source in sources)
  N = sources.focal.key.shape[2]
  tile = triton_blocks(find_target(query, sources).kind, D, query.dtype.itemsize).forward
  out: Array = jax_triton.triton_call(
    query,
    *jax.tree.leaves(sources),
    kernel=_forward_kernel,
    out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
    grid=(triton.cdiv(L, tile.block_q), H, B),
    num_warps=tile.num_warps,
    num_stages=tile.num_stages,
    L=L,
    H=H,
    N=N,
    D=D,
    r=r,
    k=k,
    w=w,
    bound_heads=sources.focal.start.shape[1],
    scale2=scale * LOG2_E,
    bias2=group_bias * LOG2_E,
    block_q=tile.block_q,
    block_k=tile.block_k,
  )
  return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _forward(scale: float, group_bias: float, query: Array, sources: KVSources) -> Array:
  return _call(scale, group_bias, query, sources)


def _no_gradient(*args: object) -> tuple[Array, None]:
  raise NotImplementedError(
    "implementation='jax_triton' has no backward pass; take 'triton' or 'xla' for gradients."
  )


_forward.defvjp(_no_gradient, _no_gradient)


@triton.jit
def _forward_kernel(
  q_ptr,
  focal_key_ptr,
  focal_value_ptr,
  focal_start_ptr,
  focal_end_ptr,
  group_key_ptr,
  group_value_ptr,
  group_start_ptr,
  group_end_ptr,
  window_key_ptr,
  window_value_ptr,
  window_start_ptr,
  window_end_ptr,
  out_ptr,
  L: tl.constexpr,
  H: tl.constexpr,
  N: tl.constexpr,
  D: tl.constexpr,
  r: tl.constexpr,
  k: tl.constexpr,
  w: tl.constexpr,
  bound_heads: tl.constexpr,
  scale2: tl.constexpr,
  bias2: tl.constexpr,
  block_q: tl.constexpr,
  block_k: tl.constexpr,
):
  # Late queries see most: their programs start first.
  first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * block_q
  head = tl.program_id(1)
  batch = tl.program_id(2).to(tl.int64)
  kv_head = head // (H // N)
  bound_head = kv_head if bound_heads > 1 else 0
  row_Q = first_row + tl.arange(0, block_q)
  column_D = tl.arange(0, D)
  inside_Q = row_Q < L
  at_QxD = ((batch * L + row_Q[:, None]) * H + head) * D + column_D[None, :]
  q_QxD = tl.load(q_ptr + at_QxD, mask=inside_Q[:, None], other=0.0)
  # Rows past the end repeat the last row's range, so that ranges never decrease along the tile.
  bound_Q = (batch * bound_heads + bound_head) * L + tl.minimum(row_Q, L - 1)

  acc_QxD = tl.zeros([block_q, D], dtype=tl.float32)
  m_Q = tl.full([block_q], -1e30, dtype=tl.float32)
  l_Q = tl.zeros([block_q], dtype=tl.float32)
  kv_D = kv_head * D + column_D  # offsets in a row of keys or values
  acc_QxD, m_Q, l_Q = _attend(
    q_QxD, acc_QxD, m_Q, l_Q,
    focal_key_ptr + batch * r * N * D, focal_value_ptr + batch * r * N * D, kv_D,
    tl.load(focal_start_ptr + bound_Q), tl.load(focal_end_ptr + bound_Q),
    scale2, 0.0, N * D, block_k,
  )  # fmt: skip
  acc_QxD, m_Q, l_Q = _attend(
    q_QxD, acc_QxD, m_Q, l_Q,
    group_key_ptr + batch * k * N * D, group_value_ptr + batch * k * N * D, kv_D,
    tl.load(group_start_ptr + bound_Q), tl.load(group_end_ptr + bound_Q),
    scale2, bias2, N * D, block_k,
  )  # fmt: skip
  acc_QxD, m_Q, l_Q = _attend(
    q_QxD, acc_QxD, m_Q, l_Q,
    window_key_ptr + batch * w * N * D, window_value_ptr + batch * w * N * D, kv_D,
    tl.load(window_start_ptr + bound_Q), tl.load(window_end_ptr + bound_Q),
    scale2, 0.0, N * D, block_k,
  )  # fmt: skip
  l_Q = tl.where(l_Q == 0, 1.0, l_Q)
  out_QxD = (acc_QxD / l_Q[:, None]).to(out_ptr.dtype.element_ty)
  tl.store(out_ptr + at_QxD, out_QxD, mask=inside_Q[:, None])


@triton.jit
def _attend(
  q_QxD,
  acc_QxD,
  m_Q,
  l_Q,
  key_ptr,
  value_ptr,
  kv_D,
  start_Q,
  end_Q,
  scale2: tl.constexpr,
  bias2: tl.constexpr,
  stride: tl.constexpr,
  block_k: tl.constexpr,
):
  last = tl.max(end_Q)
  for first in range(tl.min(start_Q), last, block_k):
    at_K = first + tl.arange(0, block_k)
    at_KxD = at_K[:, None] * stride + kv_D[None, :]
    k_KxD = tl.load(key_ptr + at_KxD, mask=(at_K < last)[:, None], other=0.0)
    v_KxD = tl.load(value_ptr + at_KxD, mask=(at_K < last)[:, None], other=0.0)
    logits_QxK = tl.dot(q_QxD, tl.trans(k_KxD)) * scale2 + bias2
    seen_QxK = (start_Q[:, None] <= at_K[None, :]) & (at_K[None, :] < end_Q[:, None])
    logits_QxK = tl.where(seen_QxK, logits_QxK, -float("inf"))
    new_m_Q = tl.maximum(m_Q, tl.max(logits_QxK, axis=1))
    p_QxK = tl.exp2(logits_QxK - new_m_Q[:, None])
    alpha_Q = tl.exp2(m_Q - new_m_Q)
    acc_QxD = acc_QxD * alpha_Q[:, None] + tl.dot(p_QxK.to(v_KxD.dtype), v_KxD)
    l_Q = l_Q * alpha_Q + tl.sum(p_QxK, axis=1)
    m_Q = new_m_Q
  return acc_QxD, m_Q, l_Q
