"""Key and value gradients of one array of keys for TPUs.

A grid step holds one tile of keys and one piece of the queries that see it, all heads of a head
tile. All products are transposed: keys are rows, so that one number for each query is a row of
lanes.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_attention.mosaic_tpu_ops import KVTile, loop_ranges, scaled
from pallas_kernels.grouped_attention.mosaic_tpu_schedule import (
  FIELDS,
  GradTile,
  Operands,
  TileRange,
  TileSchedule,
)
from pallas_kernels.kernel_common import LN_2, out_struct
from pallas_kernels.mosaic_tpu_common import dot, Interpret


class _QueryRows(NamedTuple):
  """Per piece of queries: references, or block specs."""

  query: Any  # [G, Q, D]
  dout: Any  # [G, Q, D]
  lse2: Any  # [G, Q]
  delta: Any  # [G, Q]
  bounds: Any  # [FIELDS, Q]


class _Static(NamedTuple):
  schedule: TileSchedule
  tile: GradTile
  sources: tuple[int, ...]
  key_scale: float
  length: int  # L
  piece: int  # queries of a step


def mosaic_tpu_dkdv(
  operands: Operands,
  schedule: TileSchedule,
  kv: KVTile,
  ranges: Array,
  lse2: Array,
  delta: Array,
  dout: Array,
  *,
  sources: tuple[int, ...],
  scale_keys: bool,
  tile: GradTile,
  cost: pl.CostEstimate,
  vmem: int,
  name: str,
  interpret: Interpret = False,
) -> tuple[Array, Array]:
  """dk and dv [B, N, S, D], summed over the query heads of a KV head.

  With p the softmax weights: dv = pᵀ dout, ds = p (dp − delta), dk = scale · dsᵀ q, or
  ln 2 · dsᵀ q for keys that are multiplied with the logit scale in base 2.

  Args:
    kv: keys and values [B, N, S, D], S a multiple of tile.block_k.
    ranges: `pack_query_ranges` of their tiles.
    sources: rows of the packed ranges that hold for the keys; a second one holds for groups.
    scale_keys: whether the keys are not yet multiplied with the scale.
    name: of the array of keys, for profiles.
  """
  query = operands.query
  B, _, L, D = query.shape
  _, N, S, _ = kv.key.shape
  piece = min(tile.piece, L)
  key_scale = schedule.scale2 if scale_keys else 1.0
  static = _Static(schedule, tile, sources, key_scale, L, piece)
  queries_seen = (ranges[:, :, 3] - ranges[:, :, 0]).max() * tile.block_q
  steps = jnp.maximum(-(-queries_seen // piece), 1)
  keys = pl.BlockSpec((None, None, tile.block_k, D), lambda b, n, e, h, j, _: (b, n, e, 0))
  acc = pltpu.VMEM((tile.block_k, D), jnp.float32)
  dk, dv = pl.pallas_call(
    functools.partial(_dkdv_kernel, static=static),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, N, S // tile.block_k, schedule.splits, steps),
      in_specs=[_query_specs(static, D), KVTile(keys, keys)],
      out_specs=[keys, keys],
      scratch_shapes=[acc, acc, pltpu.VMEM((tile.block_k, D), kv.key.dtype)],
    ),
    out_shape=[out_struct(x, x.shape, x.dtype) for x in kv],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=vmem,
    ),
    cost_estimate=cost,
    interpret=interpret,
    name=f"grouped_attention_dkdv_{name}",
  )(
    ranges.reshape(*ranges.shape[:2], -1),
    _QueryRows(query, dout, lse2, delta, operands.bounds),
    kv,
  )
  return dk, dv


def _query_specs(static: _Static, head_dim: int) -> _QueryRows:
  """A step's piece of the queries that see a tile of keys."""
  schedule, G = static.schedule, static.schedule.heads

  def bound_head(n: Any) -> Any:
    return 0 if schedule.shared_bounds else n

  def piece_from(b: Any, n: Any, e: Any, j: Any, ref: Any) -> Any:
    tiles = _tile_range(ref, b, bound_head(n), e)
    return _loaded_from(_nominal(tiles, j, static), static)

  def head_tile(n: Any, h: Any) -> Any:
    return n * schedule.splits + h

  rows = (pl.squeezed, pl.squeezed, pl.Element(G), pl.Element(static.piece))
  queries = pl.BlockSpec(
    (*rows[1:], pl.Element(head_dim)),
    lambda b, n, e, h, j, ref: (b, head_tile(n, h) * G, piece_from(b, n, e, j, ref), 0),
  )
  numbers = pl.BlockSpec(
    rows, lambda b, n, e, h, j, ref: (b, head_tile(n, h), 0, piece_from(b, n, e, j, ref))
  )
  bounds = pl.BlockSpec(
    (pl.squeezed, pl.squeezed, pl.Element(FIELDS), pl.Element(static.piece)),
    lambda b, n, e, h, j, ref: (b, bound_head(n), 0, piece_from(b, n, e, j, ref)),
  )
  return _QueryRows(queries, queries, numbers, numbers, bounds)


def _tile_range(ref: Any, b: Any, n: Any, e: Any) -> TileRange:
  """The tiles of queries that see a tile of keys."""
  tiles = ref.shape[2] // 4
  return TileRange(*(ref[b, n, i * tiles + e] for i in range(4)))


def _nominal(tiles: TileRange, step: Any, static: _Static) -> Any:
  """The first query of a step's piece; steps after the last one repeat its piece."""
  block_q, piece = static.tile.block_q, static.piece
  pieces = lax.div((tiles.edge - tiles.first) * block_q + (piece - 1), jnp.int32(piece))
  return tiles.first * block_q + jnp.clip(step, 0, jnp.maximum(pieces - 1, 0)) * piece


def _loaded_from(nominal: Any, static: _Static) -> Any:
  """The first query that is loaded for a piece: clamped so that the piece stays in the array."""
  start = jnp.minimum(nominal, static.length - static.piece)
  return pl.multiple_of(start, static.tile.block_q)


def _dkdv_kernel(
  ranges_ref: Any,
  rows: _QueryRows,
  kv: KVTile,
  dk_ref: Any,
  dv_ref: Any,
  dk_acc: Any,
  dv_acc: Any,
  scaled_key: Any,
  *,
  static: _Static,
) -> None:
  schedule, tile, sources = static.schedule, static.tile, static.sources
  b, n, e, h, step = (pl.program_id(i) for i in range(5))
  tiles = _tile_range(ranges_ref, b, 0 if schedule.shared_bounds else n, e)
  G, piece, D = rows.query.shape
  nominal = _nominal(tiles, step, static)
  loaded_from = _loaded_from(nominal, static)
  first_key = e * tile.block_k
  is_group = first_key >= schedule.group_offset

  @pl.when((h == 0) & (step == 0))
  def _begin() -> None:
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)
    key = kv.key[...]
    scaled_key[...] = key if static.key_scale == 1 else scaled(key, static.key_scale)

  def bound(field: int, at: Any) -> Array:
    found = [rows.bounds[source + field : source + field + 1, at] for source in sources]
    return found[0] if len(found) == 1 else jnp.where(is_group, found[1], found[0])

  def along_lanes(ref: Any, at: Any) -> Array:
    return jnp.concatenate([ref[g : g + 1, at] for g in range(G)], axis=1)

  def add(t: Array, *, masked: bool) -> None:
    at = pl.ds(pl.multiple_of(t * tile.block_q - loaded_from, tile.block_q), tile.block_q)
    q_QxD = rows.query[:, at, :].reshape(G * tile.block_q, D)
    dout_QxD = rows.dout[:, at, :].reshape(G * tile.block_q, D)
    logits = dot(scaled_key[...], q_QxD, (1, 1))
    if masked:
      key = first_key + lax.broadcasted_iota(jnp.int32, (tile.block_k, 1), 0)
      seen = (bound(0, at) <= key) & (key < bound(1, at))
      logits = jnp.minimum(logits, jnp.tile(jnp.where(seen, jnp.inf, -jnp.inf), (1, G)))
    shift = along_lanes(rows.lse2, at)
    if schedule.group_bias2 and len(sources) > 1:
      shift -= jnp.where(is_group, schedule.group_bias2, 0.0)
    p_KxQ = jnp.exp2(logits - shift)
    dv_acc[...] += dot(p_KxQ.astype(dout_QxD.dtype), dout_QxD)
    dp = dot(kv.value[...], dout_QxD, (1, 1))
    ds = p_KxQ * (dp - along_lanes(rows.delta, at))
    dk_acc[...] += dot(ds.astype(q_QxD.dtype), q_QxD)

  tiles_per_piece = piece // tile.block_q
  low = tiles.first + step * tiles_per_piece
  inside = tiles.clip(low, low + tiles_per_piece)
  loop_ranges([(inside.whole_from, inside.whole_to)], lambda t: add(t, masked=False))
  rest = [(inside.first, inside.whole_from), (inside.whole_to, inside.edge)]
  loop_ranges(rest, lambda t: add(t, masked=True))

  @pl.when((h == schedule.splits - 1) & (step == pl.num_programs(4) - 1))
  def _finish() -> None:
    dk_ref[...] = (dk_acc[...] * (LN_2 * static.key_scale)).astype(dk_ref.dtype)
    dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)
