"""Decode attention on a TPU: the live entries of a sequence's cache are read once.

A program goes through a sequence's raw tokens, then through its compact entries, in tiles. How
many live is known before the kernel runs: later tiles are neither loaded nor computed, since the
index of the last live one repeats, and only that one masks entries. The layer is an index too, so
no layer is taken out of the cache.

A cache is written token by token, all heads of an entry at once, so XLA keeps it on a TPU with an
entry's heads side by side; to ask for each head's entries side by side would have all of the cache
copied for every token. Hence a row here is one head of one entry, and each query is multiplied
with the rows of all heads and keeps those of its own. That is free: reading a row takes as long as
multiplying it with a hundred queries.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from pallas_kernels.decode.cache_arrays import CacheMask, GroupBias, is_group, raw_is_visible
from pallas_kernels.kernel_common import out_struct
from pallas_kernels.mosaic_tpu_common import dot, Interpret, LANES

_TILE_BYTES = 2**18  # of keys: with values and two in flight 1 MiB of VMEM
_MASK_VALUE = -1e30  # finite, so that what sees nothing has weights exp(−inf − _MASK_VALUE) = 0


class _Static(NamedTuple):
  scale: float
  heads: int  # N
  raw: int  # tile of raw rows
  raw_tiles: int
  compact: int  # tile of compact rows
  bias: float
  period: int


def decode_attention_mosaic_tpu(
  query: Float[Array, "B H D"],
  compact_key: Float[Array, "layers B N C D"],
  compact_value: Float[Array, "layers B N C D"],
  raw_key: Float[Array, "layers B N W D"],
  raw_value: Float[Array, "layers B N W D"],
  layer: Int[Array, ""] | int,
  visible: CacheMask,
  *,
  scale: float,
  group_bias: GroupBias | None,
  interpret: Interpret = False,
) -> Float[Array, "B H D"]:
  """See `decode_attention`."""
  B, H, D = query.shape
  (N, C), W = compact_key.shape[-3:-1], raw_key.shape[-2]
  itemsize = query.dtype.itemsize
  entries = max(1, _TILE_BYTES // (max(D, LANES) * itemsize * N))
  entries = -(-entries // 16) * 16  # whole tiles of rows, whatever N is
  raw, compact = N * min(entries, W), N * min(entries, C)
  raw_tiles = pl.cdiv(N * W, raw)
  nowhere_B = jnp.zeros(B, jnp.int32)
  bias = GroupBias(0.0, nowhere_B, nowhere_B, 1) if group_bias is None else group_bias
  static = _Static(scale, N, raw, raw_tiles, compact, bias.amount, bias.period)
  scalars = (jnp.reshape(layer, 1), *visible, bias.first, bias.prefix)

  def of_compact(b: Array, t: Array, layer: Any, end: Any, *_: Any) -> tuple[Any, ...]:
    last = lax.div(N * end[b] + (compact - 1), compact) - 1
    return layer[0], b, jnp.clip(t - raw_tiles, 0, jnp.maximum(last, 0)), 0

  def of_raw(b: Array, t: Array, layer: Any, *_: Any) -> tuple[Any, ...]:
    return layer[0], b, jnp.minimum(t, raw_tiles - 1), 0

  compact_spec = pl.BlockSpec((None, None, compact, D), of_compact)
  raw_spec = pl.BlockSpec((None, None, raw, D), of_raw)
  queries = pl.BlockSpec((None, H, D), lambda b, *_: (b, 0, 0))
  out_BxHxD: Array = pl.pallas_call(
    functools.partial(_kernel, static=static),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(B, raw_tiles + pl.cdiv(N * C, compact)),
      in_specs=[queries, compact_spec, compact_spec, raw_spec, raw_spec],
      out_specs=queries,
      scratch_shapes=[
        pltpu.VMEM((H, 1), jnp.float32),
        pltpu.VMEM((H, 1), jnp.float32),
        pltpu.VMEM((H, D), jnp.float32),
      ],
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
    *(_by_rows(x) for x in (compact_key, compact_value, raw_key, raw_value)),
  )
  return out_BxHxD


def _by_rows(x: Float[Array, "layers B N S D"]) -> Float[Array, "layers B SN D"]:
  layers, B, N, S, D = x.shape
  return x.swapaxes(2, 3).reshape(layers, B, S * N, D)


def _kernel(
  layer_ref: Any,
  compact_end_ref: Any,
  raw_end_ref: Any,
  hidden_start_ref: Any,
  hidden_end_ref: Any,
  first_ref: Any,
  prefix_ref: Any,
  q_ref: Any,
  compact_key_ref: Any,
  compact_value_ref: Any,
  raw_key_ref: Any,
  raw_value_ref: Any,
  out_ref: Any,
  *softmax_refs: Any,
  static: _Static,
) -> None:
  del layer_ref
  b, t = pl.program_id(0), pl.program_id(1)
  q_HxD = q_ref[...]
  top_ref, total_ref, sum_ref = softmax_refs

  @pl.when(t == 0)
  def _() -> None:
    top_ref[...] = jnp.full_like(top_ref, _MASK_VALUE)
    total_ref[...] = jnp.zeros_like(total_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(t < static.raw_tiles)
  def _() -> None:
    slot_1xT, own_HxT = _rows(t, static.raw, q_HxD.shape[0], static.heads)
    seen_1xT = raw_is_visible(slot_1xT, raw_end_ref[b], hidden_start_ref[b], hidden_end_ref[b])
    logits_HxT = static.scale * dot(q_HxD, raw_key_ref[...], (1, 1))
    value_TxD = _only(raw_value_ref[...], raw_end_ref[b] * static.heads - t * static.raw)
    _add(softmax_refs, jnp.where(own_HxT & seen_1xT, logits_HxT, -jnp.inf), value_TxD)

  def compact(*, masked: bool) -> None:
    tile = t - static.raw_tiles
    entry_1xT, seen_HxT = _rows(tile, static.compact, q_HxD.shape[0], static.heads)
    logits_HxT = static.scale * dot(q_HxD, compact_key_ref[...], (1, 1))
    if static.bias:
      grouped_1xT = is_group(entry_1xT, first_ref[b], prefix_ref[b], static.period)
      logits_HxT += jnp.where(grouped_1xT, static.bias, 0.0)
    value_TxD = compact_value_ref[...]
    if masked:
      seen_HxT &= entry_1xT < compact_end_ref[b]
      value_TxD = _only(value_TxD, compact_end_ref[b] * static.heads - tile * static.compact)
    _add(softmax_refs, jnp.where(seen_HxT, logits_HxT, -jnp.inf), value_TxD)

  begin = (t - static.raw_tiles) * static.compact
  end = compact_end_ref[b] * static.heads
  whole = begin + static.compact <= end
  pl.when((begin >= 0) & whole)(lambda: compact(masked=False))
  pl.when((begin >= 0) & ~whole & (begin < end))(lambda: compact(masked=True))

  @pl.when(t == pl.num_programs(1) - 1)
  def _() -> None:
    total_Hx1 = total_ref[...]
    out_HxD = sum_ref[...] / jnp.where(total_Hx1 == 0, 1.0, total_Hx1)
    out_ref[...] = out_HxD.astype(out_ref.dtype)


def _rows(t: Array, rows: int, query_heads: int, heads: int) -> tuple[Array, Array]:
  """The entry of each row of a tile, and whether a row is of a query's head."""
  row_1xT = t * rows + lax.broadcasted_iota(jnp.int32, (1, rows), 1)
  head_Hx1 = lax.broadcasted_iota(jnp.int32, (query_heads, 1), 0) // (query_heads // heads)
  return row_1xT // heads, row_1xT % heads == head_Hx1


def _only(value_TxD: Array, rows: Array) -> Array:
  """With zeros from row `rows` on: what lies behind is anything, and 0 · NaN is NaN."""
  row_TxD = lax.broadcasted_iota(jnp.int32, value_TxD.shape, 0)
  return jnp.where(row_TxD < rows, value_TxD, jnp.zeros_like(value_TxD))


def _add(softmax_refs: tuple[Any, ...], logits_HxT: Array, value_TxD: Array) -> None:
  """One step of the running softmax."""
  top_ref, total_ref, sum_ref = softmax_refs
  top_Hx1 = jnp.maximum(top_ref[...], logits_HxT.max(axis=1, keepdims=True))
  weights_HxT = jnp.exp(logits_HxT - top_Hx1)
  shrink_Hx1 = jnp.exp(top_ref[...] - top_Hx1)
  total_ref[...] = shrink_Hx1 * total_ref[...] + weights_HxT.sum(axis=1, keepdims=True)
  sum_ref[...] = shrink_Hx1 * sum_ref[...] + dot(weights_HxT.astype(value_TxD.dtype), value_TxD)
  top_ref[...] = top_Hx1
