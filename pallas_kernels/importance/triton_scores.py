"""Second pass of the importance of keys: column sums of the sampled queries' softmax."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.grouped_attention.tile_spans import like, loop_span
from pallas_kernels.grouped_attention.triton_tiles import dot
from pallas_kernels.importance.triton_rows import (
  chunk_grid,
  chunk_span,
  ImportanceTile,
  load_keys,
  Rows,
  seen_mask,
)


def triton_scores(
  rows: Rows,
  lse2_BxNxQ: Array,
  key_BxLxNxD: Array,
  scale2: float,
  tile: ImportanceTile,
  *,
  interpret: bool,
) -> Array:
  """What the rows pay to each key, [B, N, L]: Σ 2^(scale2 · q·k − lse2) over those that see it.

  Each program sums over one block of rows, for one chunk of keys.
  """
  L, D = key_BxLxNxD.shape[1], key_BxLxNxD.shape[3]
  grid, row_specs, key_spec = chunk_grid(rows, key_BxLxNxD, tile)
  blocks, N, _, B = grid
  paid_BxNxTxL = pl.pallas_call(
    functools.partial(_kernel, length=L, head_dim=D, scale2=scale2, tile=tile),
    grid=grid,
    in_specs=[
      row_specs,
      pl.BlockSpec((None, None, tile.block_q), lambda t, n, c, b: (b, n, t)),
      key_spec,
    ],
    out_specs=pl.BlockSpec((None, None, None, L), lambda t, n, c, b: (b, n, t, 0)),
    out_shape=like(key_BxLxNxD, (B, N, blocks, L), jnp.float32),
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name="importance_scores",
  )(rows, lse2_BxNxQ, key_BxLxNxD)
  return paid_BxNxTxL.sum(axis=2)


def _kernel(
  rows: Rows,
  lse2_ref: Any,
  key_ref: Any,
  paid_ref: Any,
  *,
  length: int,
  head_dim: int,
  scale2: float,
  tile: ImportanceTile,
) -> None:
  block_k = tile.block_k
  first_key, last_key, span = chunk_span(rows, length, tile)
  # Tiles lie on multiples of their size, so that what is seen and what is not share none.
  span = span._replace(first=lax.div(span.first, block_k) * block_k)
  q_QxE = rows.query[...]
  lse2_Qx1 = lse2_ref[...][:, None]

  def put(first: Array, paid_K: Array) -> None:
    part = paid_ref.at[pl.ds(first, block_k)]
    plgpu.store(part, paid_K, mask=first + jnp.arange(block_k) < last_key)

  def step(first: Array, masked: bool, carry: int) -> int:
    k_KxE = load_keys(key_ref, first, block_k, last_key if masked else None, head_dim)
    logits2_QxK = dot(q_QxE, k_KxE, trans_b=True) * scale2
    if masked:
      logits2_QxK = jnp.where(seen_mask(rows, first, last_key, block_k), logits2_QxK, -jnp.inf)
    put(first, jnp.exp2(logits2_QxK - lse2_Qx1).sum(axis=0))
    return carry

  def put_zeros(first: Array, last: Array) -> None:
    tiles = lax.div(jnp.maximum(last - first, 0) + (block_k - 1), block_k)
    zeros = jnp.zeros((block_k,), jnp.float32)
    lax.fori_loop(0, tiles, lambda t, _: put(first + t * block_k, zeros), None)

  seen_tiles = lax.div(jnp.maximum(span.last - span.first, 0) + (block_k - 1), block_k)
  put_zeros(first_key, jnp.minimum(span.first, last_key))
  put_zeros(jnp.minimum(span.first, last_key) + seen_tiles * block_k, last_key)
  loop_span(span, block_k, step, 0, has_full_tiles=length >= block_k)
