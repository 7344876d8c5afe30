"""Second pass of the importance of keys: column sums of the sampled queries' softmax."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.grouped_attention.tile_spans import like
from pallas_kernels.grouped_attention.triton_tiles import dot
from pallas_kernels.importance.triton_rows import ImportanceTile, load_keys, Rows


def triton_scores(
  rows: Rows,
  lse2_BxNxQ: Array,
  key_BxLxNxD: Array,
  scale2: float,
  heads_per_kv: int,
  tile: ImportanceTile,
  *,
  interpret: bool,
) -> Array:
  """Scores [B, N, L]: Σ 2^(scale2 · q·k − lse2) over a key's rows / its sampled queries."""
  B, N, Q, E = rows.query.shape
  L, D = key_BxLxNxD.shape[1], key_BxLxNxD.shape[3]
  row = pl.BlockSpec((None, Q), lambda n, t, b: (b, 0))
  return pl.pallas_call(
    functools.partial(
      _kernel, length=L, head_dim=D, scale2=scale2, heads_per_kv=heads_per_kv, tile=tile
    ),
    # The keys of all heads at one position lie next to each other in memory.
    grid=(N, pl.cdiv(L, tile.block_k), B),
    in_specs=[
      Rows(
        query=pl.BlockSpec((None, None, Q, E), lambda n, t, b: (b, n, 0, 0)),
        start=row,
        end=row,
        span=pl.BlockSpec((None, Q // tile.block_q, 4), lambda n, t, b: (b, 0, 0)),
      ),
      pl.BlockSpec((None, None, Q), lambda n, t, b: (b, n, 0)),
      pl.BlockSpec((None, tile.block_k, None, E), lambda n, t, b: (b, t, n, 0)),
    ],
    out_specs=pl.BlockSpec((None, None, tile.block_k), lambda n, t, b: (b, n, t)),
    out_shape=like(key_BxLxNxD, (B, N, L), jnp.float32),
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name="importance_scores",
  )(rows, lse2_BxNxQ, key_BxLxNxD)


def _kernel(
  rows: Rows,
  lse2_ref: Any,
  key_ref: Any,
  scores_ref: Any,
  *,
  length: int,
  head_dim: int,
  scale2: float,
  heads_per_kv: int,
  tile: ImportanceTile,
) -> None:
  block_q, block_k = tile.block_q, tile.block_k
  first_key = pl.program_id(1) * block_k
  keys_left = None if length % block_k == 0 else length - first_key
  k_KxE = load_keys(key_ref, 0, block_k, keys_left, head_dim)
  key_Kx1 = (first_key + jnp.arange(block_k))[:, None]

  def add(block: Array, masked: bool, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    paid_K, seen_K = carry
    part = pl.ds(block * block_q, block_q)
    logits2_KxQ = dot(k_KxE, rows.query[part, :], trans_b=True) * scale2
    if masked:
      seen_KxQ = (rows.start[part][None] <= key_Kx1) & (key_Kx1 < rows.end[part][None])
      logits2_KxQ = jnp.where(seen_KxQ, logits2_KxQ, -jnp.inf)
      seen_K += seen_KxQ.astype(jnp.int32).sum(axis=1)
    else:
      seen_K += block_q
    return paid_K + jnp.exp2(logits2_KxQ - lse2_ref[part][None]).sum(axis=1), seen_K

  def step(block: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    first, full_first, full_last, last = (rows.span[block, i] for i in range(4))
    meets = (first < first_key + block_k) & (first_key < last)
    full = (full_first <= first_key) & (first_key + block_k <= full_last)
    return lax.cond(
      full,
      lambda carry: add(block, False, carry),
      lambda carry: lax.cond(meets, lambda c: add(block, True, c), lambda c: c, carry),
      carry,
    )

  nothing = (jnp.zeros((block_k,), jnp.float32), jnp.zeros((block_k,), jnp.int32))
  blocks = rows.span.shape[0]
  paid_K, seen_K = lax.fori_loop(0, blocks, step, nothing)
  # Every query that sees a key counts once for each of its heads.
  queries_K = lax.div(jnp.maximum(seen_K, heads_per_kv), heads_per_kv)
  scores_K = paid_K / queries_K.astype(jnp.float32)
  if length % block_k == 0:
    scores_ref[...] = scores_K
  else:
    plgpu.store(scores_ref, scores_K, mask=jnp.arange(block_k) < keys_left)
