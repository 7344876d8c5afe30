"""Query gradient of grouped attention, lowered through Pallas-Triton."""

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
from pallas_kernels.kernel_common import LOG2_E, out_struct
from pallas_kernels.triton_common import dot, load_rows


def triton_dq(
  query: Array,
  sources: KVSources,
  out: Array,
  lse2: Array,
  dout: Array,
  *,
  scale: float,
  group_bias: float,
  max_window: int,
  tile: TritonTile,
  interpret: bool,
) -> tuple[Array, Array]:
  """dq [B, L, H, D] and delta [B, H, L] = Σ_D out · dout, which the key gradients also need.

  With p the softmax weights: dp = dout vᵀ, ds = p (dp − delta), dq = scale · ds k.
  """
  B, L, H, D = query.shape
  grid = QueryGrid(pl.cdiv(L, tile.block_q), tile.block_q, D, H // sources.focal.key.shape[2])
  return pl.pallas_call(
    functools.partial(
      _dq_kernel,
      grid=grid,
      length=L,
      scale=scale,
      group_bias=group_bias,
      max_window=max_window,
      block_k=tile.block_k,
    ),
    grid=(H, grid.blocks, B),
    in_specs=[grid.query(), grid.sources(sources), grid.query(), grid.row(), grid.query()],
    out_specs=[grid.query(), grid.row()],
    out_shape=[
      out_struct(query, query.shape, query.dtype),
      out_struct(query, (B, H, L), jnp.float32),
    ],
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name="grouped_attention_dq",
  )(query, sources, out, lse2, dout)


def _dq_kernel(
  q_ref: Any,
  sources: KVSourcesRef,
  out_ref: Any,
  lse2_ref: Any,
  dout_ref: Any,
  dq_ref: Any,
  delta_ref: Any,
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
  inside_Q = jnp.arange(block_q) < rows_left
  q_QxD = load_rows(q_ref, 0, block_q, rows_left)
  out_QxD = load_rows(out_ref, 0, block_q, rows_left)
  dout_QxD = load_rows(dout_ref, 0, block_q, rows_left)
  lse2_Q = plgpu.load(lse2_ref, mask=inside_Q, other=0)
  delta_Q = (out_QxD.astype(jnp.float32) * dout_QxD.astype(jnp.float32)).sum(axis=1)
  plgpu.store(delta_ref, delta_Q, mask=inside_Q)

  def attend(
    source: KVSourceRef, dq_QxD: Array, *, bias: float = 0.0, narrow: bool = False
  ) -> Array:
    def step(first: Array, masked: bool, dq_QxD: Array) -> Array:
      limit = source.end[block_q - 1] if masked else None
      k_KxD = load_rows(source.key, first, block_k, limit)
      v_KxD = load_rows(source.value, first, block_k, limit)
      logits2_QxK = dot(q_QxD, k_KxD, trans_b=True) * (scale * LOG2_E) + bias * LOG2_E
      if masked:
        logits2_QxK = jnp.where(seen_mask(source, first, block_k), logits2_QxK, -jnp.inf)
      p_QxK = jnp.exp2(logits2_QxK - lse2_Q[:, None])
      dp_QxK = dot(dout_QxD, v_KxD, trans_b=True)
      ds_QxK = p_QxK * (dp_QxK - delta_Q[:, None])
      return dq_QxD + dot(ds_QxK.astype(k_KxD.dtype), k_KxD)

    has_full_tiles = not narrow and source.key.shape[0] >= block_k
    span = tile_span(source, block_q)
    return loop_span(span, block_k, step, dq_QxD, has_full_tiles=has_full_tiles)

  dq_QxD = jnp.zeros(q_QxD.shape, jnp.float32)
  dq_QxD = attend(sources.focal, dq_QxD)
  dq_QxD = attend(sources.group, dq_QxD, bias=group_bias)
  dq_QxD = attend(sources.window, dq_QxD, narrow=max_window < block_k)
  dq_QxD = (dq_QxD * scale).astype(dq_ref.dtype)
  plgpu.store(dq_ref, dq_QxD, mask=jnp.broadcast_to(inside_Q[:, None], dq_QxD.shape))
