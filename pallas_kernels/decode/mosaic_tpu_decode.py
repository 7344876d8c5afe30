"""Decode attention on a TPU: each visible entry of a sequence's cache is read once.

A program reads a sequence's raw tokens, then its compact entries, in tiles. The number of visible
entries is known before the kernel runs. The index of later tiles repeats the last visible tile, so
that they are neither loaded nor computed, and only the last visible tile masks entries. The layer
is an index too, so that no layer is copied out of the cache.

Decoding writes a cache token by token, all heads of an entry at once. XLA therefore stores it on a
TPU with the heads of an entry next to each other. A kernel that asked for the entries of a head
next to each other would make XLA copy the whole cache for every token. Hence a row here is one head
of one entry. Each query is multiplied with the rows of all heads, and keeps the products with the
rows of its own head. The extra products cost no time: reading a row takes as long as multiplying it
with a hundred queries.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from pallas_kernels.decode.cache_arrays import CacheArrays, GroupBias
from pallas_kernels.decode.cache_layout import CacheLayout, CacheMask
from pallas_kernels.kernel_common import MASK_VALUE, out_struct
from pallas_kernels.mosaic_tpu_common import dot, Interpret, LANES

_TILE_BYTES = 2**18  # of keys: with values and double buffering 1 MiB of VMEM


class _Static(NamedTuple):
  scale: float
  heads: int  # N
  raw: int  # rows of a tile of raw tokens
  raw_tiles: int
  compact: int  # rows of a tile of compact entries
  group_bias: float
  layout: CacheLayout | None  # None without a bias


class _SoftmaxRefs(NamedTuple):
  """The running softmax: weighted sum, largest logit and sum of weights of the entries so far."""

  acc: Any  # [H, D]
  m: Any  # [H, 1]
  l: Any  # [H, 1]  # noqa: E741


def decode_attention_mosaic_tpu(
  query: Float[Array, "B H D"],
  cache: CacheArrays,
  layer: Int[Array, ""] | int,
  mask: CacheMask,
  *,
  scale: float,
  group_bias: GroupBias | None,
  interpret: Interpret = False,
) -> Float[Array, "B H D"]:
  """See `decode_attention`."""
  B, H, D = query.shape
  (N, C), W = cache.compact_key.shape[-3:-1], cache.raw_key.shape[-2]
  itemsize = query.dtype.itemsize
  entries = max(1, _TILE_BYTES // (max(D, LANES) * itemsize * N))
  entries = -(-entries // 16) * 16  # whole tiles of rows, whatever N is
  raw, compact = N * min(entries, W), N * min(entries, C)
  raw_tiles = pl.cdiv(N * W, raw)
  zero_B = jnp.zeros(B, jnp.int32)
  if group_bias is None:
    amount, layout, prefix_B, prefix_focal_B = 0.0, None, zero_B, zero_B
  else:
    amount, layout, prefix_B, prefix_focal_B = group_bias
  static = _Static(scale, N, raw, raw_tiles, compact, amount, layout)
  scalars = (jnp.reshape(layer, 1), *mask, prefix_B, prefix_focal_B)

  def compact_tile(b: Array, t: Array, layer: Any, end: Any, *_: Any) -> tuple[Any, ...]:
    last = lax.div(N * end[b] + (compact - 1), compact) - 1
    return layer[0], b, jnp.clip(t - raw_tiles, 0, jnp.maximum(last, 0)), 0

  def raw_tile(b: Array, t: Array, layer: Any, *_: Any) -> tuple[Any, ...]:
    return layer[0], b, jnp.minimum(t, raw_tiles - 1), 0

  compact_spec = pl.BlockSpec((None, None, compact, D), compact_tile)
  raw_spec = pl.BlockSpec((None, None, raw, D), raw_tile)
  query_spec = pl.BlockSpec((None, H, D), lambda b, *_: (b, 0, 0))
  scratch = _SoftmaxRefs(acc=(H, D), m=(H, 1), l=(H, 1))
  out_BxHxD: Array = pl.pallas_call(
    functools.partial(_kernel, static=static),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(B, raw_tiles + pl.cdiv(N * C, compact)),
      in_specs=[query_spec, compact_spec, compact_spec, raw_spec, raw_spec],
      out_specs=query_spec,
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    out_shape=out_struct(query, (B, H, D), query.dtype),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    cost_estimate=pl.CostEstimate(
      flops=4 * B * H * N * (C + W) * D,
      bytes_accessed=2 * B * (N * (C + W) + H) * D * itemsize,
      transcendentals=B * H * N * (C + W),
    ),
    interpret=interpret,
    name="decode_attention",
  )(
    *(jnp.asarray(x, jnp.int32) for x in scalars),
    query,
    *(
      _heads_as_rows(x)
      for x in (cache.compact_key, cache.compact_value, cache.raw_key, cache.raw_value)
    ),
  )
  return out_BxHxD


def _heads_as_rows(x: Float[Array, "layers B N S D"]) -> Float[Array, "layers B SN D"]:
  layers, B, N, S, D = x.shape
  return x.swapaxes(2, 3).reshape(layers, B, S * N, D)


def _kernel(
  layer_ref: Any,
  compact_end_ref: Any,
  raw_end_ref: Any,
  hidden_start_ref: Any,
  hidden_end_ref: Any,
  prefix_ref: Any,
  prefix_focal_ref: Any,
  q_ref: Any,
  compact_key_ref: Any,
  compact_value_ref: Any,
  raw_key_ref: Any,
  raw_value_ref: Any,
  out_ref: Any,
  *scratch: Any,
  static: _Static,
) -> None:
  del layer_ref
  b, t = pl.program_id(0), pl.program_id(1)
  q_HxD, compact_end = q_ref[...], compact_end_ref[b]
  softmax = _SoftmaxRefs(*scratch)

  @pl.when(t == 0)
  def _() -> None:
    softmax.m[...] = jnp.full_like(softmax.m, MASK_VALUE)
    softmax.l[...] = jnp.zeros_like(softmax.l)
    softmax.acc[...] = jnp.zeros_like(softmax.acc)

  @pl.when(t < static.raw_tiles)
  def _() -> None:
    slot_1xT, own_HxT = _rows(t, static.raw, q_HxD.shape[0], static.heads)
    mask = CacheMask(compact_end, raw_end_ref[b], hidden_start_ref[b], hidden_end_ref[b])
    visible_1xT = mask.sees_slot(slot_1xT)
    logits_HxT = static.scale * dot(q_HxD, raw_key_ref[...], (1, 1))
    value_TxD = _zero_from(raw_value_ref[...], mask.raw_end * static.heads - t * static.raw)
    _add_tile(softmax, jnp.where(own_HxT & visible_1xT, logits_HxT, -jnp.inf), value_TxD)

  def compact(*, masked: bool) -> None:
    tile = t - static.raw_tiles
    entry_1xT, visible_HxT = _rows(tile, static.compact, q_HxD.shape[0], static.heads)
    logits_HxT = static.scale * dot(q_HxD, compact_key_ref[...], (1, 1))
    if static.layout is not None:
      group_1xT = static.layout.is_group(entry_1xT, prefix_ref[b], prefix_focal_ref[b])
      logits_HxT += jnp.where(group_1xT, static.group_bias, 0.0)
    value_TxD = compact_value_ref[...]
    if masked:
      visible_HxT &= entry_1xT < compact_end
      value_TxD = _zero_from(value_TxD, compact_end * static.heads - tile * static.compact)
    _add_tile(softmax, jnp.where(visible_HxT, logits_HxT, -jnp.inf), value_TxD)

  begin = (t - static.raw_tiles) * static.compact
  end = compact_end * static.heads
  whole = begin + static.compact <= end
  pl.when((begin >= 0) & whole)(lambda: compact(masked=False))
  pl.when((begin >= 0) & ~whole & (begin < end))(lambda: compact(masked=True))

  @pl.when(t == pl.num_programs(1) - 1)
  def _() -> None:
    l_Hx1 = softmax.l[...]
    out_HxD = softmax.acc[...] / jnp.where(l_Hx1 == 0, 1.0, l_Hx1)
    out_ref[...] = out_HxD.astype(out_ref.dtype)


def _rows(t: Array, rows: int, query_heads: int, heads: int) -> tuple[Array, Array]:
  """The entry of each row of a tile, and whether the row belongs to a query's KV head."""
  row_1xT = t * rows + lax.broadcasted_iota(jnp.int32, (1, rows), 1)
  head_Hx1 = lax.broadcasted_iota(jnp.int32, (query_heads, 1), 0) // (query_heads // heads)
  return row_1xT // heads, row_1xT % heads == head_Hx1


def _zero_from(value_TxD: Array, row: Array) -> Array:
  """Zeros from that row on: later rows may hold anything, and 0 · NaN is NaN."""
  row_TxD = lax.broadcasted_iota(jnp.int32, value_TxD.shape, 0)
  return jnp.where(row_TxD < row, value_TxD, jnp.zeros_like(value_TxD))


def _add_tile(softmax: _SoftmaxRefs, logits_HxT: Array, value_TxD: Array) -> None:
  """One step of the running softmax."""
  m_Hx1 = jnp.maximum(softmax.m[...], logits_HxT.max(axis=1, keepdims=True))
  weights_HxT = jnp.exp(logits_HxT - m_Hx1)
  alpha_Hx1 = jnp.exp(softmax.m[...] - m_Hx1)
  softmax.l[...] = alpha_Hx1 * softmax.l[...] + weights_HxT.sum(axis=1, keepdims=True)
  weights_HxT = weights_HxT.astype(value_TxD.dtype)
  softmax.acc[...] = alpha_Hx1 * softmax.acc[...] + dot(weights_HxT, value_TxD)
  softmax.m[...] = m_Hx1
