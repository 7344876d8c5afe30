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
  lane_sum,
  QueryGrid,
  scaled,
  spread,
  summary_tiles,
)
from pallas_kernels.grouped_attention.mosaic_tpu_schedule import (
  Operands,
  pack_visits,
  read_visits,
  Walk,
)
from pallas_kernels.grouped_attention.tile_ranges import MASK_VALUE
from pallas_kernels.mosaic_tpu_common import dot, Interpret, LANES, like


def mosaic_tpu_forward(
  operands: Operands,
  walk: Walk,
  *,
  cost: pl.CostEstimate,
  vmem: int,
  interpret: Interpret = False,
) -> tuple[Array, Array]:
  """Output [B, P, G, L, D] and the base-2 logsumexp [B, P, G, L], 0 for what sees nothing."""
  query = operands.query
  B, P, _, L, D = query.shape
  grid = QueryGrid.of(operands, walk)
  visits, steps = pack_visits(operands.bounds, walk, query.dtype)
  statistic = pltpu.VMEM((walk.rows, LANES), jnp.float32)
  keys, values = operands.summary_key, operands.summary_value
  out, lse2 = pl.pallas_call(
    functools.partial(_forward_kernel, walk=walk, grid=grid),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, P, L // walk.block_q, steps),
      in_specs=[grid.query(), grid.bounds(), *grid.entries()],
      out_specs=[grid.query(), grid.row()],
      scratch_shapes=[statistic, statistic, pltpu.VMEM((walk.rows, D), jnp.float32)],
    ),
    out_shape=[
      like(query, query.shape, query.dtype),
      like(query, query.shape[:-1], jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=vmem,
    ),
    cost_estimate=cost,
    interpret=interpret,
    name="grouped_attention_forward",
  )(
    visits,
    query,
    operands.bounds,
    *(keys, values) * 3,
    operands.window_key,
    operands.window_value,
  )
  return out, lse2


def _forward_kernel(
  visits_ref: Any,
  q_ref: Any,
  bounds_ref: Any,
  block_key: Any,
  block_value: Any,
  focal_key: Any,
  focal_value: Any,
  group_key: Any,
  group_value: Any,
  piece_key: Any,
  piece_value: Any,
  out_ref: Any,
  lse2_ref: Any,
  top_ref: Any,
  total_ref: Any,
  acc_ref: Any,
  *,
  walk: Walk,
  grid: QueryGrid,
) -> None:
  b, p, t, step = (pl.program_id(i) for i in range(4))
  visits = read_visits(visits_ref, walk, b, p, t)
  G, Q, D = q_ref.shape
  q_QxD = q_ref[...].reshape(walk.rows, D)
  masks = EdgeMasks(walk, columns_of(bounds_ref[...]))
  nominal = visits.piece(step, walk)
  loaded_from = grid.loaded_from(nominal)

  def weigh(logits_QxK: Array, top_Qx1: Array, value_KxD: Array) -> tuple[Array, Array]:
    """Lane sums of the weights, and weights @ values."""
    weights = jnp.exp2(logits_QxK - spread(top_Qx1, logits_QxK.shape[1]))
    return lane_sum(weights), dot(weights.astype(value_KxD.dtype), value_KxD)

  @pl.when(step == 0)
  def _edges() -> None:
    piece = scaled(piece_key[...], walk.scale2)
    keys = jnp.concatenate([focal_key[...], group_key[...], piece], axis=0)
    values = jnp.concatenate([x[...] for x in (focal_value, group_value, piece_value)], axis=0)
    mask = masks.edges(visits, loaded_from)
    for g in range(0, G, walk.edge_heads):
      at = slice(g * Q, (g + walk.edge_heads) * Q)
      logits = capped(dot(q_QxD[at], keys, (1, 1)), mask)
      if (bias := masks.edge_bias()) is not None:
        logits += bias
      top = jnp.maximum(logits.max(axis=1, keepdims=True), MASK_VALUE)
      top = jnp.broadcast_to(top, (top.shape[0], LANES))
      top_ref[at, :] = top
      total_ref[at, :], acc_ref[at, :] = weigh(logits, top, values)

  def add(logits_QxK: Array, value_KxD: Array, bias: Array | None = None) -> None:
    old = top_ref[...]
    top = logits_QxK.max(axis=1, keepdims=True)
    new = jnp.maximum(old, top if bias is None else top + bias)
    total, acc = weigh(logits_QxK, new if bias is None else new - bias, value_KxD)
    fade = jnp.exp2(old - new)
    top_ref[...] = new
    total_ref[...] = total_ref[...] * fade + total
    acc_ref[...] = acc_ref[...] * spread(fade, D) + acc

  def add_summaries(tile: Array, row: Array, masked: bool) -> None:
    at = pl.ds(row, walk.block_k)
    logits = dot(q_QxD, block_key[at, :], (1, 1))
    if masked:
      logits = capped(logits, masks.summary(tile))
    add(logits, block_value[at, :], masks.bias(tile))

  summary_tiles(visits, walk, step, add_summaries)

  @pl.when((step > 0) & (step < visits.pieces))
  def _further_piece() -> None:
    logits = dot(q_QxD, scaled(piece_key[...], walk.scale2), (1, 1))
    add(capped(logits, masks.further_piece(nominal, loaded_from)), piece_value[...])

  @pl.when(step == pl.num_programs(3) - 1)
  def _finish() -> None:
    total = total_ref[...].sum(axis=1, keepdims=True)
    empty = total == 0
    total = jnp.broadcast_to(jnp.where(empty, 1, total), total_ref.shape)
    out_ref[...] = (acc_ref[...] * spread(1 / total, D)).reshape(G, Q, D).astype(out_ref.dtype)
    lse2 = jnp.where(empty, 0, top_ref[...] + jnp.log2(total))
    lse2_ref[...] = jnp.concatenate([lse2[g * Q : (g + 1) * Q].T[:1] for g in range(G)], axis=0)
