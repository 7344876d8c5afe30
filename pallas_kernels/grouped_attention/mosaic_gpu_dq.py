"""Query gradient of grouped attention for Hopper, written in Pallas Mosaic GPU.

The schedule is that of the forward kernel: one warpgroup loads, two compute 64 queries of one head
each.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_attention.block_sizes import MosaicQueryTile
from pallas_kernels.grouped_attention.kv_sources import (
  KVSourceRef,
  KVSources,
  KVSourcesRef,
  Runs,
)
from pallas_kernels.grouped_attention.mosaic_gpu_pipeline import (
  add_product,
  COMPILER_PARAMS,
  KVPipeline,
  load_ranges,
  operand_smem,
  ROW_LAYOUT,
  ROW_SLOTS,
  ROWS,
  RowSlots,
  seen_mask,
  TileBody,
  TileCoords,
  TileSchedule,
  WORKERS,
  WorkSplit,
  zero_accumulator,
)
from pallas_kernels.kernel_common import LOG2_E


class Buffers(NamedTuple):
  """Shared memory and barriers of one program. The result overwrites the queries."""

  pipeline: KVPipeline
  query: Any  # [ROW_SLOTS · WORKERS, ROWS, D]
  dout: Any  # [ROW_SLOTS · WORKERS, ROWS, D]
  row_slots: RowSlots


def mosaic_gpu_dq(
  query: Array,
  sources: KVSources,
  spans: Array,
  lse2: Array,
  delta: Array,
  dout: Array,
  *,
  split: WorkSplit,
  scale: float,
  group_bias: float,
  max_window: int,
  has_keys: tuple[bool, bool, bool],
  head_runs: Runs | None = None,
  tile: MosaicQueryTile,
  programs: int,
  interpret: Any = None,
) -> Array:
  """dq [B, L, H, D]. lse2 and delta = Σ_D out · dout: [B, H, padded L].

  With p the softmax weights: dp = dout vᵀ, ds = p (dp − delta), dq = scale · ds k.
  Sources and spans as for `mosaic_gpu_forward`.
  """
  D = query.shape[-1]
  schedule = TileSchedule(
    split,
    split.grid(query),
    split.runs(head_runs, sources.focal.key.shape[2]),
    tile.block_k,
    group_bias * LOG2_E,
    max_window,
    has_keys,
    has_half_tiles=False,
  )
  rows = operand_smem((ROW_SLOTS * WORKERS, ROWS, D), query.dtype)
  return plgpu.kernel(
    functools.partial(_dq_kernel, schedule=schedule, scale=scale, interpret=interpret is not None),
    out_type=jax.ShapeDtypeStruct(query.shape, query.dtype),
    scratch_types=[
      Buffers(
        pipeline=KVPipeline.scratch(tile.stages, tile.block_k, D, query.dtype),
        query=rows,
        dout=rows,
        row_slots=RowSlots.scratch(2),
      )
    ],
    grid=(min(programs, math.prod(schedule.grid)),),
    grid_names=("program",),
    num_threads=WORKERS + 1,
    thread_name="warpgroup",
    kernel_name="grouped_attention_dq",
    compiler_params=COMPILER_PARAMS,
    interpret=interpret,
  )(query, sources, spans, lse2, delta, dout)


def _dq_kernel(
  q_ref: Any,
  sources: KVSourcesRef,
  spans_ref: Any,
  lse2_ref: Any,
  delta_ref: Any,
  dout_ref: Any,
  dq_ref: Any,
  buffers: Buffers,
  *,
  schedule: TileSchedule,
  scale: float,
  interpret: bool,
) -> None:
  warpgroup = lax.axis_index("warpgroup")
  key_tiles = functools.partial(schedule.key_tiles, sources, spans_ref)

  @pl.when(warpgroup == WORKERS)
  def _load() -> None:
    plgpu.set_max_registers(40, action="decrease")

    def load_tile(coords: TileCoords, tiles_before: Array, steps: Array) -> Array:
      slot = buffers.row_slots.wait_until_free(tiles_before)
      for worker in range(WORKERS):
        rows, at = schedule.split.query_slice(coords, worker), slot * WORKERS + worker
        for ref, smem in ((q_ref, buffers.query), (dout_ref, buffers.dout)):
          plgpu.copy_gmem_to_smem(ref.at[rows], smem.at[at], buffers.row_slots.ready.at[at])
      return key_tiles(coords, functools.partial(buffers.pipeline.loads_of, coords), steps)

    steps = schedule.tiles_of_work(spans_ref, load_tile)
    buffers.row_slots.drain(schedule.tiles_of_program())
    buffers.pipeline.drain(steps)

  @pl.when(warpgroup < WORKERS)
  def _compute() -> None:
    plgpu.set_max_registers(232, action="increase")

    def compute_tile(coords: TileCoords, tiles_before: Array, steps: Array) -> Array:
      slot = buffers.row_slots.slot(tiles_before)
      rows_at = slot * WORKERS + warpgroup
      rows = schedule.split.query_slice(coords, warpgroup)
      batch, queries, head = rows
      lse2_Q, delta_Q = (
        plgpu.load(ref.at[batch, head, queries], layout=ROW_LAYOUT, optimized=False)
        for ref in (lse2_ref, delta_ref)
      )

      def steps_of(source: KVSourceRef, bias2: float, keys: int) -> TileBody:
        del keys  # All of a stage, since tiles have one width.
        ranges = load_ranges(source, (coords.batch, coords.bound_head, queries), ROW_LAYOUT)
        shift_Q = lse2_Q - bias2
        tile = functools.partial(
          _add_tile, buffers, rows_at, ranges, shift_Q, delta_Q, scale * LOG2_E, interpret
        )
        return TileBody(tile)

      plgpu.barrier_wait(buffers.row_slots.ready.at[rows_at])
      carry = (zero_accumulator(buffers.query.shape[-1]), steps)
      dq_QxD, steps = key_tiles(coords, steps_of, carry)
      smem = buffers.query.at[rows_at]
      smem[...] = (dq_QxD * scale).astype(smem.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(smem, dq_ref.at[rows])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.barrier_arrive(buffers.row_slots.free.at[slot])
      return steps

    schedule.tiles_of_work(spans_ref, compute_tile)
    plgpu.wait_smem_to_gmem(0)


def _add_tile(
  buffers: Buffers,
  rows_at: Array,
  ranges: tuple[Array, Array],
  shift_Q: Array,
  delta_Q: Array,
  scale2: float,
  interpret: bool,
  first: Array,
  masked: bool,
  carry: tuple[Array, Array],
) -> tuple[Array, Array]:
  """One worker's queries against one key tile."""
  dq_QxD, step = carry
  pipeline = buffers.pipeline
  slot = pipeline.slot(step)
  shape = (ROWS, pipeline.key.shape[1])
  plgpu.barrier_wait(pipeline.key_ready.at[slot])
  plgpu.barrier_wait(pipeline.value_ready.at[slot])

  def products(logits_ref: Any, dp_ref: Any) -> tuple[Array, Array]:
    keys, values = (x.at[slot].transpose((1, 0)) for x in (pipeline.key, pipeline.value))
    plgpu.wgmma(logits_ref, buffers.query.at[rows_at], keys)
    plgpu.wgmma(dp_ref, buffers.dout.at[rows_at], values)
    # The exponentials overlap the second product.
    logits_QxK = plgpu.wgmma_accumulator_load(logits_ref, wait_n=1)
    shift_QxK = lax.broadcast_in_dim(shift_Q, shape, [0])
    p_QxK = jnp.exp2(logits_QxK * scale2 - shift_QxK)
    return p_QxK, dp_ref[...]

  acc = plgpu.ACC(shape, jnp.float32)
  p_QxK, dp_QxK = pl.run_scoped(products, acc, acc)
  plgpu.barrier_arrive(pipeline.value_free.at[slot])
  if masked:
    p_QxK = jnp.where(seen_mask(*ranges, first, shape, query_axis=0), p_QxK, 0.0)
  ds_QxK = p_QxK * (dp_QxK - lax.broadcast_in_dim(delta_Q, shape, [0]))
  ds_QxK = ds_QxK.astype(pipeline.key.dtype)
  dq_QxD = add_product(dq_QxD, ds_QxK, pipeline.key.at[slot], interpret=interpret)
  plgpu.barrier_arrive(pipeline.key_free.at[slot])
  return dq_QxD, step + 1
