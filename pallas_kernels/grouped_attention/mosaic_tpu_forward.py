"""Forward kernel of grouped attention for TPUs."""

import functools
from typing import Any

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
  lane_sum,
  QueryGrid,
  scaled,
  spread,
  summary_tiles,
)
from pallas_kernels.grouped_attention.mosaic_tpu_schedule import (
  Operands,
  pack_key_ranges,
  read_key_ranges,
  TileSchedule,
)
from pallas_kernels.kernel_common import MASK_VALUE, out_struct
from pallas_kernels.mosaic_tpu_common import dot, Interpret, LANES


def mosaic_tpu_forward(
  operands: Operands,
  schedule: TileSchedule,
  *,
  cost: pl.CostEstimate,
  vmem: int,
  interpret: Interpret = False,
) -> tuple[Array, Array]:
  """Output [B, H, L, D] and base-2 logsumexp [B, P, G, L], 0 for queries that see nothing."""
  query = operands.query
  B, H, L, D = query.shape
  P = H // schedule.heads
  grid = QueryGrid.for_operands(operands, schedule)
  ranges, steps = pack_key_ranges(operands.bounds, schedule, query.dtype)
  statistic = pltpu.VMEM((schedule.rows, LANES), jnp.float32)
  out, lse2 = pl.pallas_call(
    functools.partial(_forward_kernel, schedule=schedule, grid=grid),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, P, L // schedule.block_q, steps),
      in_specs=[grid.query(), grid.bounds(), grid.kv()],
      out_specs=[grid.query(), grid.row()],
      scratch_shapes=[statistic, statistic, pltpu.VMEM((schedule.rows, D), jnp.float32)],
    ),
    out_shape=[
      out_struct(query, query.shape, query.dtype),
      out_struct(query, (B, P, schedule.heads, L), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=vmem,
    ),
    cost_estimate=cost,
    interpret=interpret,
    name="grouped_attention_forward",
  )(ranges, query, operands.bounds, kv_operands(operands))
  return out, lse2


def _forward_kernel(
  ranges_ref: Any,
  q_ref: Any,
  bounds_ref: Any,
  kv: KVTiles,
  out_ref: Any,
  lse2_ref: Any,
  m_ref: Any,
  l_ref: Any,
  acc_ref: Any,
  *,
  schedule: TileSchedule,
  grid: QueryGrid,
) -> None:
  b, p, t, step = (pl.program_id(i) for i in range(4))
  ranges = read_key_ranges(ranges_ref, schedule, b, p, t)
  G, Q, D = q_ref.shape
  q_QxD = q_ref[...].reshape(schedule.rows, D)
  masks = EdgeMasks(schedule, columns_of(bounds_ref[...]))
  nominal = ranges.piece(step, schedule)
  loaded_from = grid.loaded_from(nominal)

  def weigh(logits_QxK: Array, m_Qx1: Array, value_KxD: Array) -> tuple[Array, Array]:
    """Lane sums of the weights, and weights @ values."""
    p_QxK = jnp.exp2(logits_QxK - spread(m_Qx1, logits_QxK.shape[1]))
    return lane_sum(p_QxK), dot(p_QxK.astype(value_KxD.dtype), value_KxD)

  @pl.when(step == 0)
  def _edges() -> None:
    keys, values = kv.edges(schedule.scale2)
    mask = masks.edges(ranges, loaded_from)
    for g in range(0, G, schedule.edge_heads):
      at = slice(g * Q, (g + schedule.edge_heads) * Q)
      logits = capped(dot(q_QxD[at], keys, (1, 1)), mask)
      if (bias := masks.edge_bias()) is not None:
        logits += bias
      m = jnp.maximum(logits.max(axis=1, keepdims=True), MASK_VALUE)
      m = jnp.broadcast_to(m, (m.shape[0], LANES))
      m_ref[at, :] = m
      l_ref[at, :], acc_ref[at, :] = weigh(logits, m, values)

  def add(logits_QxK: Array, value_KxD: Array, bias: Array | None = None) -> None:
    old = m_ref[...]
    highest = logits_QxK.max(axis=1, keepdims=True)
    m = jnp.maximum(old, highest if bias is None else highest + bias)
    l_QxW, acc_QxD = weigh(logits_QxK, m if bias is None else m - bias, value_KxD)
    alpha = jnp.exp2(old - m)
    m_ref[...] = m
    l_ref[...] = l_ref[...] * alpha + l_QxW
    acc_ref[...] = acc_ref[...] * spread(alpha, D) + acc_QxD

  def add_summaries(tile: Array, row: Array, masked: bool) -> None:
    at = pl.ds(row, schedule.block_k)
    logits = dot(q_QxD, kv.block.key[at, :], (1, 1))
    if masked:
      logits = capped(logits, masks.summary(tile))
    add(logits, kv.block.value[at, :], masks.bias(tile))

  summary_tiles(ranges, schedule, step, add_summaries)

  @pl.when((step > 0) & (step < ranges.pieces))
  def _further_piece() -> None:
    logits = dot(q_QxD, scaled(kv.window.key[...], schedule.scale2), (1, 1))
    add(capped(logits, masks.further_piece(nominal, loaded_from)), kv.window.value[...])

  @pl.when(step == pl.num_programs(3) - 1)
  def _finish() -> None:
    l_Qx1 = l_ref[...].sum(axis=1, keepdims=True)
    empty = l_Qx1 == 0
    l_QxW = jnp.broadcast_to(jnp.where(empty, 1, l_Qx1), l_ref.shape)
    out_ref[...] = (acc_ref[...] * spread(1 / l_QxW, D)).reshape(G, Q, D).astype(out_ref.dtype)
    lse2 = jnp.where(empty, 0, m_ref[...] + jnp.log2(l_QxW))
    lse2_ref[...] = jnp.concatenate([lse2[g * Q : (g + 1) * Q].T[:1] for g in range(G)], axis=0)
