"""Key and value gradients of one key source, lowered through Pallas-Triton."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.grouped_attention.block_sizes import TritonTile
from pallas_kernels.grouped_attention.kv_sources import KVSource, KVSourceRef
from pallas_kernels.grouped_attention.tile_ranges import loop_span, query_spans, Span, sum_heads
from pallas_kernels.kernel_common import LOG2_E, out_struct
from pallas_kernels.triton_common import dot, load_rows


def triton_dkdv(
  query: Array,
  source: KVSource,
  lse2: Array,
  delta: Array,
  dout: Array,
  *,
  scale: float,
  bias: float,
  heads_per_program: int,
  tile: TritonTile,
  interpret: bool,
) -> tuple[Array, Array]:
  """dk and dv [B, S, N, D] of one source whose logits carry `bias`.

  With p the softmax weights: dv = pᵀ dout, dk = scale · dsᵀ q, ds as in `triton_dq`, summed
  over the R = H/N query heads of a KV head. A program sums `heads_per_program` of them; if that
  is fewer than R, float32 partial sums are added afterwards, in a fixed order.
  """
  B, L, H, D = query.shape
  _, S, N, _ = source.key.shape
  R = H // N
  G = heads_per_program
  partial_type = source.key.dtype if G == R else jnp.float32
  spans = query_spans(source.start[..., :L], source.end[..., :L], S, tile.block_k)
  padded_L = source.start.shape[-1]
  shared = source.start.shape[1] == 1

  def per_head(*shape: int | None) -> pl.BlockSpec:
    return pl.BlockSpec((None, *shape), lambda p, t, b: (b, 0, p, 0))

  kv: Any = pl.BlockSpec((None, tile.block_k, None, D), lambda p, t, b: (b, t, p * G // R, 0))
  rows = pl.BlockSpec((None, G, L), lambda p, t, b: (b, p, 0))
  visible: Any = pl.BlockSpec(
    (None, None, padded_L), lambda p, t, b: (b, 0 if shared else p * G // R, 0)
  )
  span = pl.BlockSpec((None, None, None, 4), lambda p, t, b: (b, 0 if shared else p * G // R, t, 0))
  grad = pl.BlockSpec((None, tile.block_k, None, D), lambda p, t, b: (b, t, p, 0))
  partial = out_struct(query, (B, S, H // G, D), partial_type)
  dk, dv = pl.pallas_call(
    functools.partial(_dkdv_kernel, length=L, num_keys=S, scale=scale, bias=bias, tile=tile),
    grid=(H // G, pl.cdiv(S, tile.block_k), B),
    in_specs=[
      per_head(L, G, D),
      KVSource(kv, kv, visible, visible),
      span,
      rows,
      rows,
      per_head(L, G, D),
    ],
    out_specs=[grad, grad],
    out_shape=[partial, partial],
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name="grouped_attention_dkdv",
  )(query, source, spans, lse2, delta, dout)
  return sum_heads(dk, source), sum_heads(dv, source)


def _dkdv_kernel(
  q_ref: Any,
  source: KVSourceRef,
  span_ref: Any,
  lse2_ref: Any,
  delta_ref: Any,
  dout_ref: Any,
  dk_ref: Any,
  dv_ref: Any,
  *,
  length: int,
  num_keys: int,
  scale: float,
  bias: float,
  tile: TritonTile,
) -> None:
  first_key = pl.program_id(1) * tile.block_k
  keys_left = num_keys - first_key
  k_KxD = load_rows(source.key, 0, tile.block_k, keys_left)
  v_KxD = load_rows(source.value, 0, tile.block_k, keys_left)
  span = Span(*(span_ref[i] for i in range(4)))

  def add_head(head: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    def step(first: Array, masked: bool, carry: tuple[Array, Array]) -> tuple[Array, Array]:
      dk_KxD, dv_KxD = carry
      limit = length if masked else None
      rows = pl.ds(first, tile.block_q)
      inside_Q = first + jnp.arange(tile.block_q) < length

      def load_row(part: Any) -> Array:
        return plgpu.load(part, mask=inside_Q, other=0) if masked else part[...]

      q_QxD = load_rows(q_ref, first, tile.block_q, limit, head=head)
      dout_QxD = load_rows(dout_ref, first, tile.block_q, limit, head=head)
      logits2_KxQ = dot(k_KxD, q_QxD, trans_b=True) * (scale * LOG2_E) + bias * LOG2_E
      if masked:
        key_K = first_key + jnp.arange(tile.block_k)[:, None]
        start_Q = load_row(source.start.at[rows])
        end_Q = load_row(source.end.at[rows])
        seen_KxQ = (start_Q[None] <= key_K) & (key_K < end_Q[None])
        logits2_KxQ = jnp.where(seen_KxQ, logits2_KxQ, -jnp.inf)
      p_KxQ = jnp.exp2(logits2_KxQ - load_row(lse2_ref.at[head, rows])[None])
      dv_KxD += dot(p_KxQ.astype(dout_QxD.dtype), dout_QxD)
      dp_KxQ = dot(v_KxD, dout_QxD, trans_b=True)
      ds_KxQ = p_KxQ * (dp_KxQ - load_row(delta_ref.at[head, rows])[None])
      dk_KxD += dot(ds_KxQ.astype(q_QxD.dtype), q_QxD)
      return dk_KxD, dv_KxD

    return loop_span(span, tile.block_q, step, carry, has_full_tiles=length >= tile.block_q)

  zeros = jnp.zeros(k_KxD.shape, jnp.float32)
  dk_KxD, dv_KxD = lax.fori_loop(0, lse2_ref.shape[0], add_head, (zeros, zeros))
  keep = jnp.broadcast_to((jnp.arange(tile.block_k) < keys_left)[:, None], k_KxD.shape)
  plgpu.store(dk_ref, (dk_KxD * scale).astype(dk_ref.dtype), mask=keep)
  plgpu.store(dv_ref, dv_KxD.astype(dv_ref.dtype), mask=keep)
