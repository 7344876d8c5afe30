"""Key and value gradients of one array of entries for TPUs.

A grid step holds one tile of entries and one piece of the queries that see it, all heads of a head
tile. All products are transposed: entries are rows, so that what is one number a query lies along
lanes.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_attention.mosaic_tpu_ops import loop_ranges, scaled
from pallas_kernels.grouped_attention.mosaic_tpu_schedule import (
  FIELDS,
  GradTile,
  LN_2,
  Operands,
  Run,
  Walk,
)
from pallas_kernels.mosaic_tpu_common import dot, Interpret, like


def mosaic_tpu_dkdv(
  operands: Operands,
  walk: Walk,
  key: Array,
  value: Array,
  runs: Array,
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
  ln 2 · dsᵀ q for keys that carry the scale.

  Args:
    key: entries [B, N, S, D], S a multiple of tile.block_k.
    runs: `pack_query_runs` of its tiles.
    sources: rows of the bounds that hold for the entries; a second one holds for groups.
    scale_keys: whether they do not carry the scale yet.
    name: of the entries, for profiles.
  """
  query = operands.query
  B, _, G, L, D = query.shape
  _, N, S, _ = key.shape
  piece = min(tile.piece, L)
  queries_seen = (runs[:, :, 3] - runs[:, :, 0]).max() * tile.block_q
  steps = jnp.maximum(-(-queries_seen // piece), 1)

  def kv_bound_head(n: Any) -> Any:
    return 0 if walk.shared_bounds else n

  def piece_from(b: Any, n: Any, e: Any, j: Any, ref: Any) -> Any:
    run = _run(ref, b, kv_bound_head(n), e)
    return _loaded_from(_nominal(run, j, tile, piece), L, piece, tile.block_q)

  def head_tile(n: Any, h: Any) -> Any:
    return n * walk.splits + h

  queries = pl.BlockSpec(
    (pl.squeezed, pl.squeezed, pl.Element(G), pl.Element(piece), pl.Element(D)),
    lambda b, n, e, h, j, ref: (b, head_tile(n, h), 0, piece_from(b, n, e, j, ref), 0),
  )
  numbers = pl.BlockSpec(
    (pl.squeezed, pl.squeezed, pl.Element(G), pl.Element(piece)),
    lambda b, n, e, h, j, ref: (b, head_tile(n, h), 0, piece_from(b, n, e, j, ref)),
  )
  bounds = pl.BlockSpec(
    (pl.squeezed, pl.squeezed, pl.Element(FIELDS), pl.Element(piece)),
    lambda b, n, e, h, j, ref: (b, kv_bound_head(n), 0, piece_from(b, n, e, j, ref)),
  )
  entries = pl.BlockSpec((None, None, tile.block_k, D), lambda b, n, e, h, j, _: (b, n, e, 0))
  acc = pltpu.VMEM((tile.block_k, D), jnp.float32)
  dk, dv = pl.pallas_call(
    functools.partial(
      _dkdv_kernel,
      walk=walk,
      sources=sources,
      key_scale=walk.scale2 if scale_keys else 1.0,
      tile=tile,
      length=L,
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, N, S // tile.block_k, walk.splits, steps),
      in_specs=[queries, queries, numbers, numbers, bounds, entries, entries],
      out_specs=[entries, entries],
      scratch_shapes=[acc, acc, pltpu.VMEM((tile.block_k, D), key.dtype)],
    ),
    out_shape=[like(key, key.shape, key.dtype), like(value, value.shape, value.dtype)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=vmem,
    ),
    cost_estimate=cost,
    interpret=interpret,
    name=f"grouped_attention_dkdv_{name}",
  )(runs.reshape(*runs.shape[:2], -1), query, dout, lse2, delta, operands.bounds, key, value)
  return dk, dv


def _run(ref: Any, b: Any, n: Any, e: Any) -> Run:
  """The tiles of queries that see a tile of entries."""
  tiles = ref.shape[2] // 4
  return Run(*(ref[b, n, i * tiles + e] for i in range(4)))


def _nominal(run: Run, step: Any, tile: GradTile, piece: int) -> Any:
  """The first query of a step's piece; steps after the last one stay there."""
  pieces = lax.div((run.edge - run.first) * tile.block_q + (piece - 1), jnp.int32(piece))
  return run.first * tile.block_q + jnp.clip(step, 0, jnp.maximum(pieces - 1, 0)) * piece


def _loaded_from(nominal: Any, length: int, piece: int, unit: int) -> Any:
  """What leaves the piece inside the array."""
  return pl.multiple_of(jnp.minimum(nominal, length - piece), unit)


def _dkdv_kernel(
  runs_ref: Any,
  q_ref: Any,
  dout_ref: Any,
  lse2_ref: Any,
  delta_ref: Any,
  bounds_ref: Any,
  key_ref: Any,
  value_ref: Any,
  dk_ref: Any,
  dv_ref: Any,
  dk_acc: Any,
  dv_acc: Any,
  scaled_key: Any,
  *,
  walk: Walk,
  sources: tuple[int, ...],
  key_scale: float,
  tile: GradTile,
  length: int,
) -> None:
  b, n, e, h, step = (pl.program_id(i) for i in range(5))
  run = _run(runs_ref, b, 0 if walk.shared_bounds else n, e)
  G, piece, D = q_ref.shape
  nominal = _nominal(run, step, tile, piece)
  loaded_from = _loaded_from(nominal, length, piece, tile.block_q)
  first_entry = e * tile.block_k
  is_group = first_entry >= walk.group_offset

  @pl.when((h == 0) & (step == 0))
  def _begin() -> None:
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)
    scaled_key[...] = key_ref[...] if key_scale == 1 else scaled(key_ref[...], key_scale)

  def bound(field: int, at: Any) -> Array:
    rows = [bounds_ref[source + field : source + field + 1, at] for source in sources]
    return rows[0] if len(rows) == 1 else jnp.where(is_group, rows[1], rows[0])

  def along_lanes(ref: Any, at: Any) -> Array:
    return jnp.concatenate([ref[g : g + 1, at] for g in range(G)], axis=1)

  def add(t: Array, *, masked: bool) -> None:
    at = pl.ds(pl.multiple_of(t * tile.block_q - loaded_from, tile.block_q), tile.block_q)
    q_QxD = q_ref[:, at, :].reshape(G * tile.block_q, D)
    dout_QxD = dout_ref[:, at, :].reshape(G * tile.block_q, D)
    logits = dot(scaled_key[...], q_QxD, (1, 1))
    if masked:
      entry = first_entry + lax.broadcasted_iota(jnp.int32, (tile.block_k, 1), 0)
      seen = (bound(0, at) <= entry) & (entry < bound(1, at))
      logits = jnp.minimum(logits, jnp.tile(jnp.where(seen, jnp.inf, -jnp.inf), (1, G)))
    shift = along_lanes(lse2_ref, at)
    if walk.group_bias2 and len(sources) > 1:
      shift -= jnp.where(is_group, walk.group_bias2, 0.0)
    weights = jnp.exp2(logits - shift)
    dv_acc[...] += dot(weights.astype(dout_QxD.dtype), dout_QxD)
    dp = dot(value_ref[...], dout_QxD, (1, 1))
    ds = weights * (dp - along_lanes(delta_ref, at))
    dk_acc[...] += dot(ds.astype(q_QxD.dtype), q_QxD)

  tiles_per_piece = piece // tile.block_q
  low = run.first + step * tiles_per_piece
  inside = run.inside(low, low + tiles_per_piece)
  loop_ranges([(inside.whole_from, inside.whole_to)], lambda t: add(t, masked=False))
  rest = [(inside.first, inside.whole_from), (inside.whole_to, inside.edge)]
  loop_ranges(rest, lambda t: add(t, masked=True))

  @pl.when((h == walk.splits - 1) & (step == pl.num_programs(4) - 1))
  def _finish() -> None:
    dk_ref[...] = (dk_acc[...] * (LN_2 * key_scale)).astype(dk_ref.dtype)
    dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)
