"""Query gradient of grouped attention for TPUs."""

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
  QueryGrid,
  scaled,
  spread,
  stack_columns,
  summary_tiles,
)
from pallas_kernels.grouped_attention.mosaic_tpu_schedule import (
  LN_2,
  Operands,
  pack_visits,
  read_visits,
  Walk,
)
from pallas_kernels.mosaic_tpu_common import dot, Interpret, LANES, like


def mosaic_tpu_dq(
  operands: Operands,
  walk: Walk,
  lse2: Array,
  delta: Array,
  dout: Array,
  *,
  cost: pl.CostEstimate,
  vmem: int,
  interpret: Interpret = False,
) -> Array:
  """The gradient of the queries, [B, P, G, L, D].

  With p the softmax weights: dp = dout vᵀ, ds = p (dp − delta), dq = ln 2 · ds k for keys that
  carry the scale.
  """
  query = operands.query
  B, P, _, L, D = query.shape
  grid = QueryGrid.of(operands, walk)
  visits, steps = pack_visits(operands.bounds, walk, query.dtype)
  statistic = pltpu.VMEM((walk.rows, LANES), jnp.float32)
  keys, values = operands.summary_key, operands.summary_value
  return pl.pallas_call(
    functools.partial(_dq_kernel, walk=walk, grid=grid),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, P, L // walk.block_q, steps),
      in_specs=[
        grid.query(),
        grid.query(),
        grid.row(),
        grid.row(),
        grid.bounds(),
        *grid.entries(),
      ],
      out_specs=grid.query(),
      scratch_shapes=[statistic, statistic, pltpu.VMEM((walk.rows, D), jnp.float32)],
    ),
    out_shape=like(query, query.shape, query.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=vmem,
    ),
    cost_estimate=cost,
    interpret=interpret,
    name="grouped_attention_dq",
  )(
    visits,
    query,
    dout,
    lse2,
    delta,
    operands.bounds,
    *(keys, values) * 3,
    operands.window_key,
    operands.window_value,
  )


def _dq_kernel(
  visits_ref: Any,
  q_ref: Any,
  dout_ref: Any,
  lse2_in_ref: Any,
  delta_in_ref: Any,
  bounds_ref: Any,
  block_key: Any,
  block_value: Any,
  focal_key: Any,
  focal_value: Any,
  group_key: Any,
  group_value: Any,
  piece_key: Any,
  piece_value: Any,
  dq_ref: Any,
  lse2_ref: Any,
  delta_ref: Any,
  acc_ref: Any,
  *,
  walk: Walk,
  grid: QueryGrid,
) -> None:
  b, p, t, step = (pl.program_id(i) for i in range(4))
  visits = read_visits(visits_ref, walk, b, p, t)
  G, Q, D = q_ref.shape
  q_QxD = q_ref[...].reshape(walk.rows, D)
  dout_QxD = dout_ref[...].reshape(walk.rows, D)
  masks = EdgeMasks(walk, columns_of(bounds_ref[...]))
  nominal = visits.piece(step, walk)
  loaded_from = grid.loaded_from(nominal)

  def gradient(
    at: slice, key_KxD: Array, value_KxD: Array, mask: Array | None, bias: Array | None
  ) -> Array:
    """What some rows get from some entries."""
    logits = dot(q_QxD[at], key_KxD, (1, 1))
    if mask is not None:
      logits = capped(logits, mask)
    if bias is not None:
      logits += bias
    width = logits.shape[1]
    weights = jnp.exp2(logits - spread(lse2_ref[at, :], width))
    dp = dot(dout_QxD[at], value_KxD, (1, 1))
    ds = weights * (dp - spread(delta_ref[at, :], width))
    return dot(ds.astype(key_KxD.dtype), key_KxD)

  everything = slice(0, walk.rows)

  @pl.when(step == 0)
  def _edges() -> None:
    lse2_ref[...] = stack_columns(lse2_in_ref[...])
    delta_ref[...] = stack_columns(delta_in_ref[...])
    piece = scaled(piece_key[...], walk.scale2)
    keys = jnp.concatenate([focal_key[...], group_key[...], piece], axis=0)
    values = jnp.concatenate([x[...] for x in (focal_value, group_value, piece_value)], axis=0)
    mask = masks.edges(visits, loaded_from)
    for g in range(0, G, walk.edge_heads):
      at = slice(g * Q, (g + walk.edge_heads) * Q)
      acc_ref[at, :] = gradient(at, keys, values, mask, masks.edge_bias())

  def add_summaries(tile: Array, row: Array, masked: bool) -> None:
    at = pl.ds(row, walk.block_k)
    mask = masks.summary(tile) if masked else None
    bias = masks.bias(tile)
    acc_ref[...] += gradient(everything, block_key[at, :], block_value[at, :], mask, bias)

  summary_tiles(visits, walk, step, add_summaries)

  @pl.when((step > 0) & (step < visits.pieces))
  def _further_piece() -> None:
    piece = scaled(piece_key[...], walk.scale2)
    mask = masks.further_piece(nominal, loaded_from)
    acc_ref[...] += gradient(everything, piece, piece_value[...], mask, None)

  @pl.when(step == pl.num_programs(3) - 1)
  def _finish() -> None:
    dq_ref[...] = (acc_ref[...] * LN_2).reshape(G, Q, D).astype(dq_ref.dtype)
