"""Forward kernel of grouped attention for Hopper, written in Pallas Mosaic GPU.

A program has three warpgroups. One loads queries, then the key and value tiles of the three
sources in order, through a pipeline of buffers that the TMA unit fills. Two compute, each for 64
queries of one head; they take turns on the tensor cores, so that one multiplies while the other
computes exponentials. In tiles without a mask, a warpgroup's product with the values also runs
beside its own softmax of the next tile. Programs are persistent: loads of the next tile of work
overlap the computation of the last one, whose queries are in another buffer.
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
  row_vector,
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
  head_runs: Runs | None = None,
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
    has_half_tiles=True,
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

      def steps_of(source: KVSourceRef, bias2: float, keys: int) -> TileBody:
        ranges = load_ranges(source, (coords.batch, coords.bound_head, rows[1]), ROW_LAYOUT)
        steps = KeySteps(buffers, query_at, ranges, keys, scale2, bias2, interpret)
        return TileBody(steps.tile, steps.full_tiles)

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


class KeySteps(NamedTuple):
  """One worker's queries against the key tiles of one source. Static but for the arrays.

  Logits are `scale2` · q·k + `bias2`, in base 2.
  """

  buffers: Buffers
  query_at: Array
  ranges: tuple[Array, Array]
  keys: int  # of a tile
  scale2: float
  bias2: float
  interpret: bool

  @property
  def _shape(self) -> tuple[int, int]:
    return ROWS, self.keys

  def tile(self, first: Array, masked: bool, carry: Any) -> Any:
    """The key tile from `first` on, all of it before the next tile."""
    acc_QxD, m_Q, l_Q, step = carry
    logits_QxK = self._logits(step)
    if masked:
      seen_QxK = seen_mask(*self.ranges, first, self._shape, query_axis=0)
      logits_QxK = jnp.where(seen_QxK, logits_QxK, -jnp.inf)
    m_Q, l_Q, alpha_Q, p_QxK = self._softmax(logits_QxK, m_Q, l_Q)
    low_QxK = p_QxK.astype(self.buffers.pipeline.value.dtype)
    acc_QxD *= lax.broadcast_in_dim(alpha_Q, acc_QxD.shape, [0])
    # The compiler may move no part of the softmax past the end of this worker's turn.
    acc_QxD, m_Q, l_Q, low_QxK = lax.optimization_barrier((acc_QxD, m_Q, l_Q, low_QxK))
    plgpu.barrier_arrive(self.buffers.turn)
    plgpu.barrier_wait(self.buffers.pipeline.value_ready.at[self.buffers.pipeline.slot(step)])
    plgpu.barrier_wait(self.buffers.turn)
    return self._add_values(acc_QxD, low_QxK, step), m_Q, l_Q, step + 1

  def full_tiles(self, count: Array, carry: Any) -> Any:
    """`count` key tiles that every query sees whole.

    The product with the values of a tile runs beside the softmax of the next tile.
    """
    pipeline = self.buffers.pipeline
    some = jnp.minimum(count, 1)

    def begin(_: Array, carry: Any) -> Any:
      acc_QxD, m_Q, l_Q, _, step = carry
      m_Q, l_Q, alpha_Q, p_QxK = self._softmax(self._logits(step), m_Q, l_Q)
      low_QxK = p_QxK.astype(pipeline.value.dtype)
      acc_QxD *= lax.broadcast_in_dim(alpha_Q, acc_QxD.shape, [0])
      acc_QxD, m_Q, l_Q, low_QxK = lax.optimization_barrier((acc_QxD, m_Q, l_Q, low_QxK))
      plgpu.barrier_wait(pipeline.value_ready.at[pipeline.slot(step)])
      _take_turn(self.buffers)
      return acc_QxD, m_Q, l_Q, low_QxK, step + 1

    def end(_: Array, carry: Any) -> Any:
      acc_QxD, m_Q, l_Q, low_QxK, step = carry
      return self._add_values(acc_QxD, low_QxK, step - 1), m_Q, l_Q, low_QxK, step

    acc_QxD, m_Q, l_Q, step = carry
    low_QxK = plgpu.layout_cast(jnp.zeros(self._shape, pipeline.value.dtype), plgpu.Layout.WGMMA)
    carry = lax.fori_loop(0, some, begin, (acc_QxD, m_Q, l_Q, low_QxK, step))
    carry = lax.fori_loop(some, count, lambda _, c: self._overlapped(*c), carry)
    acc_QxD, m_Q, l_Q, _, step = lax.fori_loop(0, some, end, carry)
    return acc_QxD, m_Q, l_Q, step

  def _overlapped(
    self, acc_QxD: Array, m_Q: Array, l_Q: Array, low_QxK: Array, step: Array
  ) -> tuple[Array, Array, Array, Array, Array]:
    """The logits and softmax of one tile, and the product with the values of the tile before it."""
    pipeline, last = self.buffers.pipeline, self.buffers.pipeline.slot(step - 1)
    if self.interpret:  # One after another: see `add_product`.
      acc_QxD = self._add_values(acc_QxD, low_QxK, step - 1)
      m_Q, l_Q, alpha_Q, p_QxK = self._softmax(self._logits(step), m_Q, l_Q)
      plgpu.barrier_wait(pipeline.value_ready.at[pipeline.slot(step)])
      low_QxK = p_QxK.astype(pipeline.value.dtype)
      _take_turn(self.buffers)
      acc_QxD *= lax.broadcast_in_dim(alpha_Q, acc_QxD.shape, [0])
      return acc_QxD, m_Q, l_Q, low_QxK, step + 1

    def products(refs: Any) -> None:
      acc_ref, m_ref, l_ref, alpha_ref, p_ref = refs

      def logits(logits_ref: Any) -> Array:
        slot = pipeline.slot(step)
        plgpu.barrier_wait(pipeline.key_ready.at[slot])
        keys = pipeline.key.at[slot, pl.ds(0, self.keys)].transpose((1, 0))
        plgpu.wgmma(logits_ref, self.buffers.query.at[self.query_at], keys)
        plgpu.wgmma(acc_ref, low_QxK, pipeline.value.at[last])
        _take_turn(self.buffers)
        logits_QxK = plgpu.wgmma_accumulator_load(logits_ref, wait_n=1)
        plgpu.barrier_arrive(pipeline.key_free.at[slot])
        return logits_QxK

      logits_QxK = pl.run_scoped(logits, plgpu.ACC(self._shape, jnp.float32))
      results = self._softmax(logits_QxK, m_ref[...], l_ref[...])
      # The compiler may move no part of the softmax past the wait for the product.
      results = lax.optimization_barrier(results)
      plgpu.barrier_wait(pipeline.value_ready.at[pipeline.slot(step)])
      for ref, x in zip((m_ref, l_ref, alpha_ref, p_ref), results, strict=True):
        ref[...] = x

    no_p = plgpu.layout_cast(jnp.zeros(self._shape, jnp.float32), plgpu.Layout.WGMMA)
    state = (plgpu.ACC.init(acc_QxD), m_Q, l_Q, row_vector(0.0), no_p)
    acc_QxD, m_Q, l_Q, alpha_Q, p_QxK = pl.run_state(products)(state)
    # Rounded here: until the product ends, its weights occupy the registers of the rounded ones.
    low_QxK = lax.optimization_barrier(p_QxK).astype(low_QxK.dtype)
    plgpu.barrier_arrive(pipeline.value_free.at[last])
    acc_QxD *= lax.broadcast_in_dim(alpha_Q, acc_QxD.shape, [0])
    _take_turn(self.buffers)
    return acc_QxD, m_Q, l_Q, low_QxK, step + 1

  def _logits(self, step: Array) -> Array:
    """q·k of a key tile, in this worker's turn."""
    pipeline = self.buffers.pipeline
    slot = pipeline.slot(step)

    def product(acc_ref: Any) -> Array:
      keys = pipeline.key.at[slot, pl.ds(0, self.keys)].transpose((1, 0))
      plgpu.wgmma(acc_ref, self.buffers.query.at[self.query_at], keys)
      _take_turn(self.buffers)
      return acc_ref[...]

    plgpu.barrier_wait(pipeline.key_ready.at[slot])
    logits_QxK = pl.run_scoped(product, plgpu.ACC(self._shape, jnp.float32))
    plgpu.barrier_arrive(pipeline.key_free.at[slot])
    return logits_QxK

  def _softmax(
    self, logits_QxK: Array, m_Q: Array, l_Q: Array
  ) -> tuple[Array, Array, Array, Array]:
    """The new maximum and sum of the online softmax, alpha = 2^(old m - new m), the weights."""
    new_m_Q = jnp.maximum(m_Q, logits_QxK.max(axis=1) * self.scale2 + self.bias2)
    alpha_Q = jnp.exp2(m_Q - new_m_Q)
    shift_QxK = lax.broadcast_in_dim(new_m_Q - self.bias2, logits_QxK.shape, [0])
    p_QxK = jnp.exp2(logits_QxK * self.scale2 - shift_QxK)
    l_Q = l_Q * alpha_Q + p_QxK.sum(axis=1)
    return new_m_Q, l_Q, alpha_Q, p_QxK

  def _add_values(self, acc_QxD: Array, low_QxK: Array, step: Array) -> Array:
    """acc + weights @ values of a loaded tile."""
    pipeline = self.buffers.pipeline
    slot = pipeline.slot(step)
    acc_QxD = add_product(
      acc_QxD, low_QxK, pipeline.value.at[slot, pl.ds(0, self.keys)], interpret=self.interpret
    )
    plgpu.barrier_arrive(pipeline.value_free.at[slot])
    return acc_QxD


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
