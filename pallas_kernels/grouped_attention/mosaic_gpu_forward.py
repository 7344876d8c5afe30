"""Forward kernel of grouped attention for Hopper, written in Pallas Mosaic GPU.

A program has three warpgroups. One loads queries, then the key and value tiles of the three
sources in order, through a pipeline of buffers that the TMA unit fills. Two compute, each for 64
queries of one head; they take turns on the tensor cores, so that one multiplies while the other
computes exponentials. Programs are persistent: loads of the next tile of work overlap the
computation of the last one, whose queries are in another buffer.
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
  HeadRuns,
  KVSourceRef,
  KVSources,
  KVSourcesRef,
)
from pallas_kernels.grouped_attention.mosaic_gpu_pipeline import (
  add_product,
  COMPILER_PARAMS,
  KVPipeline,
  load_ranges,
  operand_smem,
  ROW_LAYOUT,
  ROW_SLOTS,
  row_vector,
  ROWS,
  RowSlots,
  seen_mask,
  TileCoords,
  TileSchedule,
  WORKERS,
  WorkSplit,
  zero_accumulator,
)
from pallas_kernels.kernel_common import LOG2_E, MASK_VALUE


class Buffers(NamedTuple):
  """Shared memory and barriers of one program."""

  pipeline: KVPipeline
  query: Any  # [ROW_SLOTS · WORKERS, ROWS, D]
  query_slots: RowSlots
  turn: Any  # see `_take_turn`
  out: Any  # [WORKERS, ROWS, D]
  lse2: Any  # [WORKERS, ROWS]


def mosaic_gpu_forward(
  query: Array,
  sources: KVSources,
  spans: Array,
  *,
  split: WorkSplit,
  scale: float,
  group_bias: float,
  max_window: int,
  has_keys: tuple[bool, bool, bool],
  head_runs: HeadRuns | None = None,
  tile: MosaicQueryTile,
  programs: int,
  interpret: Any = None,
) -> tuple[Array, Array]:
  """Output [B, L, H, D] and the base-2 logsumexp [B, H, padded L].

  Every source has at least tile.block_k tokens, and its ranges are padded to a multiple of
  split.queries. spans: `tile_ranges` of the sources. has_keys: whether any query sees keys of each
  source.
  """
  B, _, H, D = query.shape
  dtype = query.dtype
  schedule = TileSchedule(
    split,
    split.grid(query),
    split.runs(head_runs, sources.focal.key.shape[2]),
    tile.block_k,
    group_bias * LOG2_E,
    max_window,
    has_keys,
  )
  rows = operand_smem((WORKERS, ROWS, D), dtype)
  queries = operand_smem((ROW_SLOTS * WORKERS, ROWS, D), dtype)
  return plgpu.kernel(
    functools.partial(
      _forward_kernel, schedule=schedule, scale2=scale * LOG2_E, interpret=interpret is not None
    ),
    out_type=(
      jax.ShapeDtypeStruct(query.shape, dtype),
      jax.ShapeDtypeStruct((B, H, sources.focal.start.shape[-1]), jnp.float32),
    ),
    scratch_types=[
      Buffers(
        pipeline=KVPipeline.scratch(tile.stages, tile.block_k, D, dtype),
        query=queries,
        query_slots=RowSlots.scratch(1),
        turn=plgpu.Barrier(num_arrivals=WORKERS),
        out=rows,
        lse2=plgpu.SMEM((WORKERS, ROWS), jnp.float32),
      )
    ],
    grid=(min(programs, math.prod(schedule.grid)),),
    grid_names=("program",),
    num_threads=WORKERS + 1,
    thread_name="warpgroup",
    kernel_name="grouped_attention_forward",
    compiler_params=COMPILER_PARAMS,
    interpret=interpret,
  )(query, sources, spans)


def _forward_kernel(
  q_ref: Any,
  sources: KVSourcesRef,
  spans_ref: Any,
  out_ref: Any,
  lse2_ref: Any,
  buffers: Buffers,
  *,
  schedule: TileSchedule,
  scale2: float,
  interpret: bool,
) -> None:
  warpgroup = lax.axis_index("warpgroup")
  key_tiles = functools.partial(schedule.key_tiles, sources, spans_ref)

  @pl.when(warpgroup == WORKERS)
  def _load() -> None:
    plgpu.set_max_registers(40, action="decrease")

    def load_tile(coords: TileCoords, tiles_before: Array, steps: Array) -> Array:
      slot = buffers.query_slots.wait_until_free(tiles_before)
      for worker in range(WORKERS):
        at = slot * WORKERS + worker
        plgpu.copy_gmem_to_smem(
          q_ref.at[schedule.split.query_slice(coords, worker)],
          buffers.query.at[at],
          buffers.query_slots.ready.at[at],
        )
      return key_tiles(coords, functools.partial(buffers.pipeline.loads_of, coords), steps)

    steps = schedule.tiles_of_work(spans_ref, load_tile)
    buffers.query_slots.drain(schedule.tiles_of_program())
    buffers.pipeline.drain(steps)

  @pl.when(warpgroup < WORKERS)
  def _compute() -> None:
    plgpu.set_max_registers(232, action="increase")

    def compute_tile(coords: TileCoords, tiles_before: Array, steps: Array) -> Array:
      slot = buffers.query_slots.slot(tiles_before)
      query_at = slot * WORKERS + warpgroup
      rows = schedule.split.query_slice(coords, warpgroup)

      def steps_of(source: KVSourceRef, bias2: float) -> Any:
        ranges = load_ranges(source, (coords.batch, coords.bound_head, rows[1]), ROW_LAYOUT)
        return functools.partial(_attend, buffers, query_at, ranges, scale2, bias2, interpret)

      plgpu.barrier_wait(buffers.query_slots.ready.at[query_at])
      zeros = zero_accumulator(buffers.query.shape[-1])
      carry = (zeros, row_vector(MASK_VALUE), row_vector(0.0), steps)
      acc_QxD, m_Q, l_Q, steps = key_tiles(coords, steps_of, carry)
      plgpu.barrier_arrive(buffers.query_slots.free.at[slot])
      _write(buffers, out_ref, lse2_ref, rows, acc_QxD, m_Q, l_Q)
      return steps

    pl.when(warpgroup == 1)(lambda: _take_turn(buffers))
    schedule.tiles_of_work(spans_ref, compute_tile)
    pl.when(warpgroup == 0)(lambda: _take_turn(buffers))
    plgpu.wait_smem_to_gmem(0)


def _take_turn(buffers: Buffers) -> None:
  """Synchronizes with the other worker, which is one turn ahead or behind.

  Worker 1 starts one turn late, so that the phases of the workers interleave, across tiles of work
  too. Worker 0 takes one more turn after its last step. Both then have taken equally many.
  """
  plgpu.barrier_arrive(buffers.turn)
  plgpu.barrier_wait(buffers.turn)


def _attend(
  buffers: Buffers,
  query_at: Array,
  ranges: tuple[Array, Array],
  scale2: float,
  bias2: float,
  interpret: bool,
  first: Array,
  masked: bool,
  carry: tuple[Array, Array, Array, Array],
) -> tuple[Array, Array, Array, Array]:
  """One worker's queries against one key tile."""
  acc_QxD, m_Q, l_Q, step = carry
  pipeline = buffers.pipeline
  slot = pipeline.slot(step)
  shape = (ROWS, pipeline.key.shape[1])

  def query_key(acc_ref: Any) -> Array:
    keys = pipeline.key.at[slot].transpose((1, 0))
    plgpu.wgmma(acc_ref, buffers.query.at[query_at], keys)
    _take_turn(buffers)
    return acc_ref[...]

  plgpu.barrier_wait(pipeline.key_ready.at[slot])
  logits_QxK = pl.run_scoped(query_key, plgpu.ACC(shape, jnp.float32))
  plgpu.barrier_arrive(pipeline.key_free.at[slot])
  if masked:
    seen_QxK = seen_mask(*ranges, first, shape, query_axis=0)
    logits_QxK = jnp.where(seen_QxK, logits_QxK, -jnp.inf)

  new_m_Q = jnp.maximum(m_Q, logits_QxK.max(axis=1) * scale2 + bias2)
  alpha_Q = jnp.exp2(m_Q - new_m_Q)
  shift_QxK = lax.broadcast_in_dim(new_m_Q - bias2, shape, [0])
  p_QxK = jnp.exp2(logits_QxK * scale2 - shift_QxK)
  acc_QxD *= lax.broadcast_in_dim(alpha_Q, acc_QxD.shape, [0])
  l_Q = l_Q * alpha_Q + p_QxK.sum(axis=1)
  low_QxK = p_QxK.astype(pipeline.value.dtype)
  # The compiler may move no part of the softmax past the end of this worker's turn.
  acc_QxD, l_Q, new_m_Q, low_QxK = lax.optimization_barrier((acc_QxD, l_Q, new_m_Q, low_QxK))
  plgpu.barrier_arrive(buffers.turn)
  plgpu.barrier_wait(pipeline.value_ready.at[slot])
  plgpu.barrier_wait(buffers.turn)
  acc_QxD = add_product(acc_QxD, low_QxK, pipeline.value.at[slot], interpret=interpret)
  plgpu.barrier_arrive(pipeline.value_free.at[slot])
  return acc_QxD, new_m_Q, l_Q, step + 1


def _write(
  buffers: Buffers,
  out_ref: Any,
  lse2_ref: Any,
  rows: tuple[Array, Any, Array],
  acc_QxD: Array,
  m_Q: Array,
  l_Q: Array,
) -> None:
  """Stores one worker's normalised output and logsumexp."""
  worker = lax.axis_index("warpgroup")
  batch, queries, head = rows
  empty_Q = l_Q == 0
  l_Q = jnp.where(empty_Q, 1.0, l_Q)
  out_QxD = acc_QxD * lax.broadcast_in_dim(1 / l_Q, acc_QxD.shape, [0])
  lse2_Q = jnp.where(empty_Q, 0.0, m_Q + jnp.log(l_Q) * LOG2_E)
  out_smem, lse2_smem = buffers.out.at[worker], buffers.lse2.at[worker]
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous tile of work is stored
  out_smem[...] = out_QxD.astype(out_smem.dtype)
  lse2_smem[...] = lse2_Q
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(out_smem, out_ref.at[rows])
  plgpu.copy_smem_to_gmem(lse2_smem, lse2_ref.at[batch, head, queries])
