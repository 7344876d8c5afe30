"""Forward kernel of grouped attention for Hopper, written in Pallas Mosaic GPU.

A program has three warpgroups. One loads: queries, then the key and value tiles of the three
sources, one after the other, through a ring of buffers that the TMA unit fills. Two compute, each
64 queries of one head; they take turns on the tensor cores, so that one multiplies while the other
takes exponentials. Programs stay and take one tile of work after another, so that loads for the
next tile run under the end of the last.
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
from pallas_kernels.grouped_attention.kv_sources import KVSourceRef, KVSources, KVSourcesRef
from pallas_kernels.grouped_attention.mosaic_gpu_pipeline import (
  add_product,
  COMPILER_PARAMS,
  KeyRing,
  load_bounds,
  operand_smem,
  Place,
  ROW_LAYOUT,
  row_vector,
  ROWS,
  seen_mask,
  Walk,
  WORKERS,
  WorkSplit,
  zero_accumulator,
)
from pallas_kernels.grouped_attention.tile_ranges import LOG2_E, MASK_VALUE


class Buffers(NamedTuple):
  """Shared memory and barriers of one program."""

  ring: KeyRing
  query: Any  # [WORKERS, ROWS, D]
  query_ready: Any
  query_free: Any
  turn: Any  # see _take_turn
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
  tile: MosaicQueryTile,
  programs: int,
  interpret: Any = None,
) -> tuple[Array, Array]:
  """Output [B, L, H, D] and the base-2 logsumexp [B, H, padded L].

  Every source holds at least tile.block_k entries; its bounds are padded to a multiple of
  split.queries. spans: `tile_ranges` of the same.
  """
  B, _, H, D = query.shape
  dtype = query.dtype
  walk = Walk(split, split.grid(query), tile.block_k, group_bias * LOG2_E, max_window)
  rows = operand_smem((WORKERS, ROWS, D), dtype)
  return plgpu.kernel(
    functools.partial(
      _forward_kernel, walk=walk, scale2=scale * LOG2_E, interpret=interpret is not None
    ),
    out_type=(
      jax.ShapeDtypeStruct(query.shape, dtype),
      jax.ShapeDtypeStruct((B, H, sources.focal.start.shape[-1]), jnp.float32),
    ),
    scratch_types=[
      Buffers(
        ring=KeyRing.scratch(tile.stages, tile.block_k, D, dtype),
        query=rows,
        query_ready=plgpu.Barrier(num_barriers=WORKERS),
        query_free=plgpu.Barrier(num_arrivals=WORKERS),
        turn=plgpu.Barrier(num_arrivals=WORKERS),
        out=rows,
        lse2=plgpu.SMEM((WORKERS, ROWS), jnp.float32),
      )
    ],
    grid=(min(programs, math.prod(walk.grid)),),
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
  walk: Walk,
  scale2: float,
  interpret: bool,
) -> None:
  warpgroup = lax.axis_index("warpgroup")
  key_tiles = functools.partial(walk.key_tiles, sources, spans_ref)

  @pl.when(warpgroup == WORKERS)
  def _load() -> None:
    plgpu.set_max_registers(40, action="decrease")

    def load_tile(place: Place, tiles_before: Array, steps: Array) -> Array:
      pl.when(tiles_before > 0)(lambda: plgpu.barrier_wait(buffers.query_free))
      for worker in range(WORKERS):
        plgpu.copy_gmem_to_smem(
          q_ref.at[walk.split.query_slice(place, worker)],
          buffers.query.at[worker],
          buffers.query_ready.at[worker],
        )
      return key_tiles(place, functools.partial(buffers.ring.load, place), steps)

    steps = walk.tiles_of_work(spans_ref, load_tile)
    plgpu.barrier_wait(buffers.query_free)
    buffers.ring.drain(steps)

  @pl.when(warpgroup < WORKERS)
  def _compute() -> None:
    plgpu.set_max_registers(232, action="increase")

    def compute_tile(place: Place, tiles_before: Array, steps: Array) -> Array:
      del tiles_before
      plgpu.barrier_wait(buffers.query_ready.at[warpgroup])
      pl.when(warpgroup == 1)(lambda: _take_turn(buffers))
      rows = walk.split.query_slice(place, warpgroup)
      step = functools.partial(_attend, buffers, place, rows[1], scale2, interpret)
      zeros = zero_accumulator(buffers.query.shape[-1])
      carry = (zeros, row_vector(MASK_VALUE), row_vector(0.0), steps)
      acc_QxD, top_Q, total_Q, steps = key_tiles(place, step, carry)
      pl.when(warpgroup == 0)(lambda: plgpu.barrier_arrive(buffers.turn))
      _write(buffers, out_ref, lse2_ref, rows, acc_QxD, top_Q, total_Q)
      pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(buffers.turn))
      return steps

    walk.tiles_of_work(spans_ref, compute_tile)
    plgpu.wait_smem_to_gmem(0)


def _take_turn(buffers: Buffers) -> None:
  """Meets the other worker. One starts a turn late, so that their phases interleave.

  That worker's last turn of a tile of work falls after the other's last step: without an extra
  turn there, the two would wait for each other, through the query buffer.
  """
  plgpu.barrier_arrive(buffers.turn)
  plgpu.barrier_wait(buffers.turn)


def _attend(
  buffers: Buffers,
  place: Place,
  rows: Any,
  scale2: float,
  interpret: bool,
  source: KVSourceRef,
  bias2: float,
  first: Array,
  masked: bool,
  carry: tuple[Array, Array, Array, Array],
) -> tuple[Array, Array, Array, Array]:
  """One worker's queries against one key tile."""
  acc_QxD, top_Q, total_Q, step = carry
  worker = lax.axis_index("warpgroup")
  ring = buffers.ring
  slot = ring.slot(step)
  shape = (ROWS, ring.key.shape[1])

  def query_key(acc_ref: Any) -> Array:
    keys = ring.key.at[slot].transpose((1, 0))
    plgpu.wgmma(acc_ref, buffers.query.at[worker], keys)
    _take_turn(buffers)
    return acc_ref[...]

  plgpu.barrier_wait(ring.key_ready.at[slot])
  logits_QxK = pl.run_scoped(query_key, plgpu.ACC(shape, jnp.float32))
  plgpu.barrier_arrive(ring.key_free.at[slot])
  if masked:
    start_Q, end_Q = load_bounds(source, (place.batch, place.bound_head, rows), ROW_LAYOUT)
    seen_QxK = seen_mask(start_Q, end_Q, first, shape, query_axis=0)
    logits_QxK = jnp.where(seen_QxK, logits_QxK, -jnp.inf)

  new_top_Q = jnp.maximum(top_Q, logits_QxK.max(axis=1) * scale2 + bias2)
  fade_Q = jnp.exp2(top_Q - new_top_Q)
  shift_QxK = lax.broadcast_in_dim(new_top_Q - bias2, shape, [0])
  weights_QxK = jnp.exp2(logits_QxK * scale2 - shift_QxK)
  acc_QxD *= lax.broadcast_in_dim(fade_Q, acc_QxD.shape, [0])
  total_Q = total_Q * fade_Q + weights_QxK.sum(axis=1)
  low_QxK = weights_QxK.astype(ring.value.dtype)
  # All of the softmax comes before the turn is handed over.
  acc_QxD, total_Q, new_top_Q, low_QxK = lax.optimization_barrier(
    (acc_QxD, total_Q, new_top_Q, low_QxK)
  )
  plgpu.barrier_arrive(buffers.turn)
  plgpu.barrier_wait(ring.value_ready.at[slot])
  plgpu.barrier_wait(buffers.turn)
  acc_QxD = add_product(acc_QxD, low_QxK, ring.value.at[slot], interpret=interpret)
  plgpu.barrier_arrive(ring.value_free.at[slot])
  return acc_QxD, new_top_Q, total_Q, step + 1


def _write(
  buffers: Buffers,
  out_ref: Any,
  lse2_ref: Any,
  rows: tuple[Array, Any, Array],
  acc_QxD: Array,
  top_Q: Array,
  total_Q: Array,
) -> None:
  """Frees the query buffer, normalises one worker's sums and sends them off."""
  worker = lax.axis_index("warpgroup")
  batch, queries, head = rows
  plgpu.barrier_arrive(buffers.query_free)
  empty_Q = total_Q == 0
  total_Q = jnp.where(empty_Q, 1.0, total_Q)
  out_QxD = acc_QxD * lax.broadcast_in_dim(1 / total_Q, acc_QxD.shape, [0])
  lse2_Q = jnp.where(empty_Q, 0.0, top_Q + jnp.log(total_Q) * LOG2_E)
  out_smem, lse2_smem = buffers.out.at[worker], buffers.lse2.at[worker]
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's output has left
  out_smem[...] = out_QxD.astype(out_smem.dtype)
  lse2_smem[...] = lse2_Q
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(out_smem, out_ref.at[rows])
  plgpu.copy_smem_to_gmem(lse2_smem, lse2_ref.at[batch, head, queries])
