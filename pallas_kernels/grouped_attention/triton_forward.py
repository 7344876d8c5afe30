"""Forward kernel of grouped attention, lowered through Pallas-Triton (Ampere and newer)."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.grouped_attention.block_sizes import TritonTile
from pallas_kernels.grouped_attention.kv_sources import KVSourceRef, KVSources, KVSourcesRef
from pallas_kernels.grouped_attention.tile_ranges import loop_span
from pallas_kernels.grouped_attention.triton_tiles import QueryGrid, seen_mask, tile_span
from pallas_kernels.kernel_common import LOG2_E, MASK_VALUE, out_struct
from pallas_kernels.triton_common import dot, load_rows, online_softmax_step


def triton_forward(
  query: Array,
  sources: KVSources,
  *,
  scale: float,
  group_bias: float,
  max_window: int,
  tile: TritonTile,
  interpret: bool,
) -> tuple[Array, Array]:
  """Output [B, L, H, D] and the base-2 logsumexp [B, H, L] (0 for queries that see nothing).

  Every source has at least one token, and its ranges are padded to a multiple of tile.block_q.
  """
  B, L, H, D = query.shape
  grid = QueryGrid(pl.cdiv(L, tile.block_q), tile.block_q, D, H // sources.focal.key.shape[2])
  return pl.pallas_call(
    functools.partial(
      _forward_kernel,
      grid=grid,
      length=L,
      scale=scale,
      group_bias=group_bias,
      max_window=max_window,
      block_k=tile.block_k,
    ),
    grid=(H, grid.blocks, B),
    in_specs=[grid.query(), grid.sources(sources)],
    out_specs=[grid.query(), grid.row()],
    out_shape=[
      out_struct(query, query.shape, query.dtype),
      out_struct(query, (B, H, L), jnp.float32),
    ],
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name="grouped_attention_forward",
  )(query, sources)


def _forward_kernel(
  q_ref: Any,
  sources: KVSourcesRef,
  out_ref: Any,
  lse2_ref: Any,
  *,
  grid: QueryGrid,
  length: int,
  scale: float,
  group_bias: float,
  max_window: int,
  block_k: int,
) -> None:
  block_q = grid.block_q
  rows_left = length - grid.first_row()
  q_QxD = load_rows(q_ref, 0, block_q, rows_left)

  def attend(source: KVSourceRef, carry: Any, *, bias: float = 0.0, narrow: bool = False) -> Any:
    def step(first: Array, masked: bool, carry: Any) -> Any:
      acc_QxD, m_Q, l_Q = carry
      limit = source.end[block_q - 1] if masked else None
      k_KxD = load_rows(source.key, first, block_k, limit)
      logits2_QxK = dot(q_QxD, k_KxD, trans_b=True) * (scale * LOG2_E) + bias * LOG2_E
      if masked:
        logits2_QxK = jnp.where(seen_mask(source, first, block_k), logits2_QxK, -jnp.inf)
      m_Q, alpha_Q, p_QxK = online_softmax_step(m_Q, logits2_QxK)
      v_KxD = load_rows(source.value, first, block_k, limit)
      acc_QxD = acc_QxD * alpha_Q[:, None] + dot(p_QxK.astype(v_KxD.dtype), v_KxD)
      return acc_QxD, m_Q, l_Q * alpha_Q + p_QxK.sum(axis=1)

    has_full_tiles = not narrow and source.key.shape[0] >= block_k
    span = tile_span(source, block_q)
    return loop_span(span, block_k, step, carry, has_full_tiles=has_full_tiles)

  carry = (
    jnp.zeros(q_QxD.shape, jnp.float32),
    jnp.full((block_q,), MASK_VALUE, jnp.float32),
    jnp.zeros((block_q,), jnp.float32),
  )
  carry = attend(sources.focal, carry)
  carry = attend(sources.group, carry, bias=group_bias)
  acc_QxD, m_Q, l_Q = attend(sources.window, carry, narrow=max_window < block_k)

  inside_Q = jnp.arange(block_q) < rows_left
  empty_Q = l_Q == 0
  l_Q = jnp.where(empty_Q, 1, l_Q)
  out_QxD = (acc_QxD / l_Q[:, None]).astype(out_ref.dtype)
  plgpu.store(out_ref, out_QxD, mask=jnp.broadcast_to(inside_Q[:, None], out_QxD.shape))
  plgpu.store(lse2_ref, jnp.where(empty_Q, 0, m_Q + jnp.log2(l_Q)), mask=inside_Q)
