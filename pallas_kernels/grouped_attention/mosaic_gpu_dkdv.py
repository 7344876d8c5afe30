"""Key and value gradients of one key source for Hopper, written in Pallas Mosaic GPU.

A program holds 128 keys, 64 for each computing warpgroup, while a third warpgroup loads the queries
that see them, tile by tile, head by head. All products are transposed: keys are rows. The two
computing warpgroups take turns on the tensor cores, so that one multiplies while the other computes
exponentials.

A source with few keys has fewer key tiles than a GPU has multiprocessors. The queries that see a
key tile are then divided into chunks, each chunk is a tile of work, and the caller adds the partial
sums of the chunks. The order of all additions is fixed, so results repeat bit for bit.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_attention.block_sizes import MosaicKeyTile
from pallas_kernels.grouped_attention.kv_sources import KVSource, KVSourceRef, Runs
from pallas_kernels.grouped_attention.mosaic_gpu_pipeline import (
  add_products,
  COLUMN_LAYOUT,
  COMPILER_PARAMS,
  load_ranges,
  operand_smem,
  ROWS,
  scaled_runs,
  seen_mask,
  work_loop,
  WORKERS,
  zero_accumulator,
)
from pallas_kernels.grouped_attention.tile_ranges import chunk_of_span, loop_span, Span
from pallas_kernels.kernel_common import LOG2_E

KEYS = ROWS * WORKERS  # of one program


class QueryPipeline(NamedTuple):
  """Stages of query tiles in shared memory: `ready` is loaded, `free` is read by both workers."""

  query: Any  # [stages, Q, D]
  dout: Any  # [stages, Q, D]
  lse2: Any  # [stages, Q]
  delta: Any  # [stages, Q]
  query_ready: Any  # with lse2
  dout_ready: Any
  delta_ready: Any
  free: Any

  def slot(self, step: Array) -> Array:
    """The stage that holds the query tile number `step`."""
    return lax.rem(step, jnp.int32(self.query.shape[0]))


class Buffers(NamedTuple):
  """Shared memory and barriers of one program. The results overwrite the keys and values."""

  pipeline: QueryPipeline
  key: Any  # [WORKERS, ROWS, D]
  value: Any  # [WORKERS, ROWS, D]
  kv_ready: Any
  kv_free: Any
  turn: Any  # see `_take_turn`


class KeyTileCoords(NamedTuple):
  """A tile of work: keys of one KV head, and a chunk of the queries that see the keys."""

  batch: Array
  kv_head: Array
  bound_head: Array | int
  first_key: Array
  part: Array  # index of the partial sum: (KV head, chunk)
  head: Array  # the first query head


class KeyTileSchedule(NamedTuple):
  """The order in which all warpgroups of a program go through its work. Static."""

  grid: tuple[int, int, int]  # tiles of keys, batch, KV heads · chunks
  runs: Runs  # of KV heads · chunks
  chunks: int
  heads_per_kv: int
  block_q: int

  def tiles_of_work(self, spans_ref: Any, body: Any) -> Array:
    """Calls body(coords, its span, tiles before, query tiles before) -> query tiles after."""

    def tile(index: tuple[Array, ...], tiles_before: Array, carry: Array) -> Array:
      # Most queries see early keys: these go first.
      number, batch, part = index
      kv_head, chunk = lax.div(part, jnp.int32(self.chunks)), lax.rem(part, jnp.int32(self.chunks))
      bound_head = 0 if spans_ref.shape[1] == 1 else kv_head
      span = Span(*(spans_ref[batch, bound_head, number, i] for i in range(4)))
      span = chunk_of_span(span, chunk, self.chunks, self.block_q)
      head = kv_head * self.heads_per_kv
      coords = KeyTileCoords(batch, kv_head, bound_head, number * KEYS, part, head)
      return body(coords, span, tiles_before, carry)

    return work_loop(self.grid, self.runs, tile)

  def query_tiles(self, coords: KeyTileCoords, span: Span, body: Any, carry: Any) -> Any:
    """Calls body(head, first query, masked, carry) for every query tile that sees the keys."""

    def one_head(i: Array, carry: Any) -> Any:
      step = functools.partial(body, coords.head + i)
      return loop_span(span, self.block_q, step, carry)

    return lax.fori_loop(0, self.heads_per_kv, one_head, carry)


def mosaic_gpu_dkdv(
  query: Array,
  source: KVSource,
  spans: Array,
  lse2: Array,
  delta: Array,
  dout: Array,
  *,
  scale: float,
  bias: float,
  chunks: int,
  head_runs: Runs | None = None,
  tile: MosaicKeyTile,
  programs: int,
  name: str,
  interpret: Any = None,
) -> tuple[Array, Array]:
  """dk and dv of one source, each a sum over a chunk of the queries: [B, S, N · chunks, D].

  In the operands' dtype with one chunk, else in float32. S is padded to a multiple of 128 keys. The
  ranges are padded by tile.block_q queries.

  Args:
    spans: `query_spans` of the source.
    chunks: parts of equal size into which the query tiles of each key tile are divided.
    head_runs: the order in which heads are visited; None for 0, 1, … N − 1.
    name: of the source, for profiles.
  """
  B, _, H, D = query.shape
  _, S, N, _ = source.key.shape
  dtype = query.dtype
  grid = (math.ceil(S / KEYS), B, N * chunks)
  schedule = KeyTileSchedule(grid, scaled_runs(head_runs, N, chunks), chunks, H // N, tile.block_q)
  partial = jax.ShapeDtypeStruct(
    (B, schedule.grid[0] * KEYS, N * chunks, D), dtype if chunks == 1 else jnp.float32
  )
  stages, block_q = tile.stages, tile.block_q
  queries = operand_smem((stages, block_q, D), dtype)
  numbers = plgpu.SMEM((stages, block_q), jnp.float32)
  rows = operand_smem((WORKERS, ROWS, D), dtype)
  return plgpu.kernel(
    functools.partial(
      _dkdv_kernel,
      schedule=schedule,
      scale=scale,
      bias2=bias * LOG2_E,
      interpret=interpret is not None,
    ),
    out_type=(partial, partial),
    scratch_types=[
      Buffers(
        pipeline=QueryPipeline(
          queries,
          queries,
          numbers,
          numbers,
          query_ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
          dout_ready=plgpu.Barrier(num_barriers=stages),
          delta_ready=plgpu.Barrier(num_barriers=stages),
          free=plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
        ),
        key=rows,
        value=rows,
        kv_ready=plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS),
        kv_free=plgpu.Barrier(num_arrivals=WORKERS),
        turn=plgpu.Barrier(num_arrivals=WORKERS),
      )
    ],
    grid=(min(programs, math.prod(schedule.grid)),),
    grid_names=("program",),
    num_threads=WORKERS + 1,
    thread_name="warpgroup",
    kernel_name=f"grouped_attention_dkdv_{name}",
    compiler_params=COMPILER_PARAMS,
    interpret=interpret,
  )(query, source, spans, lse2, delta, dout)


def _dkdv_kernel(
  q_ref: Any,
  source: KVSourceRef,
  spans_ref: Any,
  lse2_ref: Any,
  delta_ref: Any,
  dout_ref: Any,
  dk_ref: Any,
  dv_ref: Any,
  buffers: Buffers,
  *,
  schedule: KeyTileSchedule,
  scale: float,
  bias2: float,
  interpret: bool,
) -> None:
  warpgroup = lax.axis_index("warpgroup")
  pipeline = buffers.pipeline

  @pl.when(warpgroup == WORKERS)
  def _load() -> None:
    plgpu.set_max_registers(40, action="decrease")

    def load_tile(coords: KeyTileCoords, span: Span, tiles_before: Array, steps: Array) -> Array:
      pl.when(tiles_before > 0)(lambda: plgpu.barrier_wait(buffers.kv_free))
      for worker in range(WORKERS):
        rows = (coords.batch, pl.ds(coords.first_key + worker * ROWS, ROWS), coords.kv_head)
        for ref, smem in ((source.key, buffers.key), (source.value, buffers.value)):
          plgpu.copy_gmem_to_smem(ref.at[rows], smem.at[worker], buffers.kv_ready.at[worker])
      load = functools.partial(
        _load_queries, pipeline, coords, q_ref, dout_ref, lse2_ref, delta_ref
      )
      return schedule.query_tiles(coords, span, load, steps)

    steps = schedule.tiles_of_work(spans_ref, load_tile)
    plgpu.barrier_wait(buffers.kv_free)
    for stage in range(pipeline.query.shape[0]):
      pl.when(steps > stage)(functools.partial(plgpu.barrier_wait, pipeline.free.at[stage]))

  @pl.when(warpgroup < WORKERS)
  def _compute() -> None:
    plgpu.set_max_registers(232, action="increase")

    def compute_tile(coords: KeyTileCoords, span: Span, tiles_before: Array, steps: Array) -> Array:
      del tiles_before
      plgpu.barrier_wait(buffers.kv_ready.at[warpgroup])
      zeros = zero_accumulator(buffers.key.shape[-1])
      step = functools.partial(
        _add_queries, buffers, source, coords, scale * LOG2_E, bias2, interpret
      )
      carry = (zeros, zeros, steps)
      # Worker 1 is one turn late. Both wait for one another in every tile of work, since the keys
      # and values of the next one need the same shared memory.
      pl.when(warpgroup == 1)(lambda: _take_turn(buffers))
      dk_KxD, dv_KxD, steps = schedule.query_tiles(coords, span, step, carry)
      pl.when(warpgroup == 0)(lambda: _take_turn(buffers))
      _write(buffers, coords, dk_ref, dv_ref, dk_KxD * scale, dv_KxD)
      plgpu.barrier_arrive(buffers.kv_free)
      return steps

    schedule.tiles_of_work(spans_ref, compute_tile)
    plgpu.wait_smem_to_gmem(0)


def _load_queries(
  pipeline: QueryPipeline,
  coords: KeyTileCoords,
  q_ref: Any,
  dout_ref: Any,
  lse2_ref: Any,
  delta_ref: Any,
  head: Array,
  first: Array,
  masked: bool,
  step: Array,
) -> Array:
  """Loads into the next stage once it is free."""
  del masked
  stages, block_q, _ = pipeline.query.shape
  slot = pipeline.slot(step)
  pl.when(step >= stages)(lambda: plgpu.barrier_wait(pipeline.free.at[slot]))
  rows = pl.ds(first, block_q)
  for ref, at, smem, ready in (
    (q_ref, (coords.batch, rows, head), pipeline.query, pipeline.query_ready),
    (lse2_ref, (coords.batch, head, rows), pipeline.lse2, pipeline.query_ready),
    (dout_ref, (coords.batch, rows, head), pipeline.dout, pipeline.dout_ready),
    (delta_ref, (coords.batch, head, rows), pipeline.delta, pipeline.delta_ready),
  ):
    plgpu.copy_gmem_to_smem(ref.at[at], smem.at[slot], ready.at[slot])
  return step + 1


def _add_queries(
  buffers: Buffers,
  source: KVSourceRef,
  coords: KeyTileCoords,
  scale2: float,
  bias2: float,
  interpret: bool,
  head: Array,
  first: Array,
  masked: bool,
  carry: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
  """One worker's keys against one query tile of one head."""
  del head
  dk_KxD, dv_KxD, step = carry
  worker = lax.axis_index("warpgroup")
  pipeline = buffers.pipeline
  slot = pipeline.slot(step)
  shape = (ROWS, pipeline.query.shape[1])

  def products(logits_ref: Any, dp_ref: Any) -> tuple[Array, Array]:
    queries, douts = (x.at[slot].transpose((1, 0)) for x in (pipeline.query, pipeline.dout))
    plgpu.barrier_wait(pipeline.query_ready.at[slot])
    plgpu.wgmma(logits_ref, buffers.key.at[worker], queries)
    plgpu.barrier_wait(pipeline.dout_ready.at[slot])
    plgpu.wgmma(dp_ref, buffers.value.at[worker], douts)
    _take_turn(buffers)
    # The exponentials overlap the second product.
    logits_KxQ = plgpu.wgmma_accumulator_load(logits_ref, wait_n=1)
    lse2_Q = plgpu.load(pipeline.lse2.at[slot], layout=COLUMN_LAYOUT)
    shift_KxQ = lax.broadcast_in_dim(lse2_Q - bias2, shape, [1])
    p_KxQ = lax.optimization_barrier(jnp.exp2(logits_KxQ * scale2 - shift_KxQ))
    # Without a wait for memory here, the compiler moves the wait for the second product up.
    plgpu.barrier_wait(pipeline.delta_ready.at[slot])
    return p_KxQ, dp_ref[...]

  acc = plgpu.ACC(shape, jnp.float32)
  p_KxQ, dp_KxQ = pl.run_scoped(products, acc, acc)
  if masked:
    at = (coords.batch, coords.bound_head, pl.ds(first, shape[1]))
    start_Q, end_Q = load_ranges(source, at, COLUMN_LAYOUT)
    first_key = coords.first_key + worker * ROWS
    p_KxQ = jnp.where(seen_mask(start_Q, end_Q, first_key, shape, query_axis=1), p_KxQ, 0.0)
  delta_Q = plgpu.load(pipeline.delta.at[slot], layout=COLUMN_LAYOUT)
  ds_KxQ = p_KxQ * (dp_KxQ - lax.broadcast_in_dim(delta_Q, shape, [1]))
  low = (p_KxQ.astype(pipeline.dout.dtype), ds_KxQ.astype(pipeline.query.dtype))
  operands = ((low[0], pipeline.dout.at[slot]), (low[1], pipeline.query.at[slot]))
  _take_turn(buffers)
  dv_KxD, dk_KxD = add_products((dv_KxD, dk_KxD), operands, interpret=interpret)
  plgpu.barrier_arrive(pipeline.free.at[slot])
  return dk_KxD, dv_KxD, step + 1


def _take_turn(buffers: Buffers) -> None:
  """Synchronizes with the other worker, which is one turn ahead or behind."""
  plgpu.barrier_arrive(buffers.turn)
  plgpu.barrier_wait(buffers.turn)


def _write(
  buffers: Buffers, coords: KeyTileCoords, dk_ref: Any, dv_ref: Any, dk_KxD: Array, dv_KxD: Array
) -> None:
  """Stores one worker's sums; on return its shared memory is free."""
  worker = lax.axis_index("warpgroup")
  at = (coords.batch, pl.ds(coords.first_key + worker * ROWS, ROWS), coords.part)
  if dk_ref.dtype == jnp.float32:  # does not fit the buffers of the keys and values
    dk_ref[at] = dk_KxD
    dv_ref[at] = dv_KxD
    return
  for ref, smem, x_KxD in ((dk_ref, buffers.key, dk_KxD), (dv_ref, buffers.value, dv_KxD)):
    smem.at[worker][...] = x_KxD.astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.at[worker], ref.at[at])
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
