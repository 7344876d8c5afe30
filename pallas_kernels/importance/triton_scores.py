"""Second pass of the importance of keys: column sums of the sampled queries' softmax."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
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
from pallas_kernels.triton_common import dot, padded_slice


def triton_scores(
  rows: Rows,
  lse2_BxNxCxQ: Array,
  key_BxLxNxD: Array,
  scale2: float,
  heads_per_kv: int,
  tile: ImportanceTile,
  *,
  interpret: bool,
) -> Array:
  """Attention of all rows to each key, [B, N, L]: Σ 2^(scale2 · q·k − lse2) over rows that see it.

  lse2 is given for each of C chunks of keys. A program sums over one block of rows, for one
  chunk.
  """
  L, D = key_BxLxNxD.shape[1], key_BxLxNxD.shape[3]
  grid, row_specs, key_spec = chunk_grid(rows, key_BxLxNxD, tile)
  blocks, N, chunks, B = grid
  score_BxNxTxL = pl.pallas_call(
    functools.partial(
      _kernel, length=L, head_dim=D, scale2=scale2, heads_per_kv=heads_per_kv, tile=tile
    ),
    grid=grid,
    in_specs=[
      row_specs,
      pl.BlockSpec((None, None, chunks, tile.block_q), lambda t, n, c, b: (b, n, 0, t)),
      key_spec,
    ],
    out_specs=pl.BlockSpec((None, None, None, L), lambda t, n, c, b: (b, n, t, 0)),
    out_shape=out_struct(key_BxLxNxD, (B, N, blocks, L), jnp.float32),
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name="importance_scores",
  )(rows, lse2_BxNxCxQ, key_BxLxNxD)
  return score_BxNxTxL.sum(axis=2)


def _kernel(
  rows: Rows,
  lse2_ref: Any,
  key_ref: Any,
  score_ref: Any,
  *,
  length: int,
  head_dim: int,
  scale2: float,
  heads_per_kv: int,
  tile: ImportanceTile,
) -> None:
  block_k = tile.block_k
  chunk = Chunk.for_program(rows, length, heads_per_kv, tile)
  span = chunk.span()
  # Tiles begin at multiples of their size: no tile holds both a seen span and zeros before it.
  span = span._replace(first=lax.div(span.first, block_k) * block_k)
  q_QxE = rows.query[...]
  lse2_Qx1 = _combine(lse2_ref)[:, None]

  def put(first: Array, score_K: Array) -> None:
    part = score_ref.at[pl.ds(first, block_k)]
    plgpu.store(part, score_K, mask=first + jnp.arange(block_k) < chunk.last)

  def step(first: Array, masked: bool, carry: int) -> int:
    k_KxE = load_keys(key_ref, first, block_k, chunk.last if masked else None, head_dim)
    logits2_QxK = dot(q_QxE, k_KxE, trans_b=True) * scale2
    if masked:
      logits2_QxK = jnp.where(chunk.seen(first, block_k), logits2_QxK, -jnp.inf)
    put(first, jnp.exp2(logits2_QxK - lse2_Qx1).sum(axis=0))
    return carry

  def put_zeros(first: Array, last: Array) -> None:
    tiles = lax.div(jnp.maximum(last - first, 0) + (block_k - 1), block_k)
    zeros = jnp.zeros((block_k,), jnp.float32)
    lax.fori_loop(0, tiles, lambda t, _: put(first + t * block_k, zeros), None)

  seen_tiles = lax.div(jnp.maximum(span.last - span.first, 0) + (block_k - 1), block_k)
  put_zeros(chunk.first, jnp.minimum(span.first, chunk.last))
  put_zeros(jnp.minimum(span.first, chunk.last) + seen_tiles * block_k, chunk.last)
  loop_span(span, block_k, step, 0, has_full_tiles=length >= block_k)


def _combine(lse2_ref: Any) -> Array:
  """The logsumexp over all chunks, 0 for rows that see nothing."""
  chunks, block_q = lse2_ref.shape
  rows = pl.next_power_of_2(chunks)
  keep = jnp.broadcast_to((jnp.arange(rows) < chunks)[:, None], (rows, block_q))
  lse2_CxQ = plgpu.load(lse2_ref.at[padded_slice(0, rows), :], mask=keep, other=MASK_VALUE)
  m_Q = lse2_CxQ.max(axis=0)
  lse2_Q = m_Q + jnp.log2(jnp.exp2(lse2_CxQ - m_Q[None]).sum(axis=0))
  return jnp.where(lse2_Q <= MASK_VALUE / 2, 0, lse2_Q)
