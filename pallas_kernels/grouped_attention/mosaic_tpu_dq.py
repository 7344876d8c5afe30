"""Query gradient of grouped attention for TPUs."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_attention.mosaic_tpu_ops import (
  capped,
  columns_of,
  EdgeMasks,
  kv_operands,
  KVTiles,
  QueryGrid,
  scaled,
  spread,
  stack_columns,
  summary_tiles,
)
from pallas_kernels.grouped_attention.mosaic_tpu_schedule import (
  Operands,
  pack_key_ranges,
  read_key_ranges,
  TileSchedule,
)
from pallas_kernels.kernel_common import LN_2, out_struct
from pallas_kernels.mosaic_tpu_common import dot, Interpret, LANES


class _QueryRows(NamedTuple):
  """Per tile of queries: references, or block specs."""

  query: Any  # [G, Q, D]
  dout: Any  # [G, Q, D]
  lse2: Any  # [G, Q]
  delta: Any  # [G, Q]
  bounds: Any  # [FIELDS, Q]


def mosaic_tpu_dq(
  operands: Operands,
  schedule: TileSchedule,
  lse2: Array,
  delta: Array,
  dout: Array,
  *,
  cost: pl.CostEstimate,
  vmem: int,
  interpret: Interpret = False,
) -> Array:
  """The gradient of the queries, [B, H, L, D].

  With p the softmax weights: dp = dout vᵀ, ds = p (dp − delta), dq = ln 2 · ds k for keys that
  are multiplied with the logit scale in base 2.
  """
  query = operands.query
  B, H, L, D = query.shape
  grid = QueryGrid.for_operands(operands, schedule)
  ranges, steps = pack_key_ranges(operands.bounds, schedule, query.dtype)
  statistic = pltpu.VMEM((schedule.rows, LANES), jnp.float32)
  specs = _QueryRows(grid.query(), grid.query(), grid.row(), grid.row(), grid.bounds())
  return pl.pallas_call(
    functools.partial(_dq_kernel, schedule=schedule, grid=grid),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, H // schedule.heads, L // schedule.block_q, steps),
      in_specs=[specs, grid.kv()],
      out_specs=grid.query(),
      scratch_shapes=[statistic, statistic, pltpu.VMEM((schedule.rows, D), jnp.float32)],
    ),
    out_shape=out_struct(query, query.shape, query.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=vmem,
    ),
    cost_estimate=cost,
    interpret=interpret,
    name="grouped_attention_dq",
  )(ranges, _QueryRows(query, dout, lse2, delta, operands.bounds), kv_operands(operands))


def _dq_kernel(
  ranges_ref: Any,
  rows: _QueryRows,
  kv: KVTiles,
  dq_ref: Any,
  lse2_ref: Any,
  delta_ref: Any,
  acc_ref: Any,
  *,
  schedule: TileSchedule,
  grid: QueryGrid,
) -> None:
  b, p, t, step = (pl.program_id(i) for i in range(4))
  ranges = read_key_ranges(ranges_ref, schedule, b, p, t)
  G, Q, D = rows.query.shape
  q_QxD = rows.query[...].reshape(schedule.rows, D)
  dout_QxD = rows.dout[...].reshape(schedule.rows, D)
  masks = EdgeMasks(schedule, columns_of(rows.bounds[...]))
  nominal = ranges.piece(step, schedule)
  loaded_from = grid.loaded_from(nominal)

  def gradient(
    at: slice, key_KxD: Array, value_KxD: Array, mask: Array | None, bias: Array | None
  ) -> Array:
    """ds k of the rows `at` and some keys."""
    logits = dot(q_QxD[at], key_KxD, (1, 1))
    if mask is not None:
      logits = capped(logits, mask)
    if bias is not None:
      logits += bias
    width = logits.shape[1]
    p_QxK = jnp.exp2(logits - spread(lse2_ref[at, :], width))
    dp = dot(dout_QxD[at], value_KxD, (1, 1))
    ds = p_QxK * (dp - spread(delta_ref[at, :], width))
    return dot(ds.astype(key_KxD.dtype), key_KxD)

  everything = slice(0, schedule.rows)

  @pl.when(step == 0)
  def _edges() -> None:
    lse2_ref[...] = stack_columns(rows.lse2[...])
    delta_ref[...] = stack_columns(rows.delta[...])
    keys, values = kv.edges(schedule.scale2)
    mask = masks.edges(ranges, loaded_from)
    for g in range(0, G, schedule.edge_heads):
      at = slice(g * Q, (g + schedule.edge_heads) * Q)
      acc_ref[at, :] = gradient(at, keys, values, mask, masks.edge_bias())

  def add_summaries(tile: Array, row: Array, masked: bool) -> None:
    at = pl.ds(row, schedule.block_k)
    mask = masks.summary(tile) if masked else None
    bias = masks.bias(tile)
    acc_ref[...] += gradient(everything, kv.block.key[at, :], kv.block.value[at, :], mask, bias)

  summary_tiles(ranges, schedule, step, add_summaries)

  @pl.when((step > 0) & (step < ranges.pieces))
  def _further_piece() -> None:
    piece = scaled(kv.window.key[...], schedule.scale2)
    mask = masks.further_piece(nominal, loaded_from)
    acc_ref[...] += gradient(everything, piece, kv.window.value[...], mask, None)

  @pl.when(step == pl.num_programs(3) - 1)
  def _finish() -> None:
    dq_ref[...] = (acc_ref[...] * LN_2).reshape(G, Q, D).astype(dq_ref.dtype)
