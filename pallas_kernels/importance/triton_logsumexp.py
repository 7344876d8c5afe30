"""First pass of the importance of keys: the logsumexp of each sampled query's logits."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.grouped_attention.tile_ranges import loop_span
from pallas_kernels.importance.triton_tiles import (
  Chunk,
  chunk_grid,
  ImportanceTile,
  load_keys,
  Rows,
)
from pallas_kernels.kernel_common import MASK_VALUE, out_struct
from pallas_kernels.triton_common import dot, online_softmax_step


def triton_logsumexp(
  rows: Rows,
  key_BxLxNxD: Array,
  scale2: float,
  heads_per_kv: int,
  tile: ImportanceTile,
  *,
  interpret: bool,
) -> Array:
  """Base-2 logsumexp [B, N, chunks, Q] of scale2 · q·k over the keys of a chunk.

  `MASK_VALUE` for rows that see none of them.
  """
  L, D = key_BxLxNxD.shape[1], key_BxLxNxD.shape[3]
  grid, row_specs, key_spec = chunk_grid(rows, key_BxLxNxD, tile)
  _, N, chunks, B = grid
  return pl.pallas_call(
    functools.partial(
      _kernel, length=L, head_dim=D, scale2=scale2, heads_per_kv=heads_per_kv, tile=tile
    ),
    grid=grid,
    in_specs=[row_specs, key_spec],
    out_specs=pl.BlockSpec((None, None, None, tile.block_q), lambda t, n, c, b: (b, n, c, t)),
    out_shape=out_struct(key_BxLxNxD, (B, N, chunks, rows.query.shape[2]), jnp.float32),
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name="importance_logsumexp",
  )(rows, key_BxLxNxD)


def _kernel(
  rows: Rows,
  key_ref: Any,
  lse2_ref: Any,
  *,
  length: int,
  head_dim: int,
  scale2: float,
  heads_per_kv: int,
  tile: ImportanceTile,
) -> None:
  block_k = tile.block_k
  chunk = Chunk.for_program(rows, length, heads_per_kv, tile)
  q_QxE = rows.query[...]

  def step(first: Array, masked: bool, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    m_Q, l_Q = carry
    k_KxE = load_keys(key_ref, first, block_k, chunk.last if masked else None, head_dim)
    logits2_QxK = dot(q_QxE, k_KxE, trans_b=True) * scale2
    if masked:
      logits2_QxK = jnp.where(chunk.seen(first, block_k), logits2_QxK, -jnp.inf)
    m_Q, alpha_Q, p_QxK = online_softmax_step(m_Q, logits2_QxK)
    return m_Q, l_Q * alpha_Q + p_QxK.sum(axis=1)

  start = (
    jnp.full((tile.block_q,), MASK_VALUE, jnp.float32),
    jnp.zeros((tile.block_q,), jnp.float32),
  )
  has_full_tiles = length >= block_k
  m_Q, l_Q = loop_span(chunk.span(), block_k, step, start, has_full_tiles=has_full_tiles)
  empty_Q = l_Q == 0
  lse2_Q = m_Q + jnp.log2(jnp.where(empty_Q, 1, l_Q))
  lse2_ref[...] = jnp.where(empty_Q, MASK_VALUE, lse2_Q)
