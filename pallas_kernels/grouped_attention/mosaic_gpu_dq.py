"""Query gradient of grouped attention for Hopper, written in Pallas Mosaic GPU.

The walk is the forward kernel's: one warpgroup loads, two compute 64 queries of one head each.
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
  ROWS,
  seen_mask,
  Walk,
  WORKERS,
  WorkSplit,
  zero_accumulator,
)
from pallas_kernels.grouped_attention.tile_ranges import LOG2_E


class Buffers(NamedTuple):
  """Shared memory and barriers of one program. The result takes the queries' place."""

  ring: KeyRing
  query: Any  # [WORKERS, ROWS, D]
  dout: Any  # [WORKERS, ROWS, D]
  rows_ready: Any
  rows_free: Any


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
  tile: MosaicQueryTile,
  programs: int,
  interpret: Any = None,
) -> Array:
  """dq [B, L, H, D]. lse2 and delta = Σ_D out · dout: [B, H, padded L].

  With p the softmax weights: dp = dout vᵀ, ds = p (dp − delta), dq = scale · ds k.
  Sources and spans as for `mosaic_gpu_forward`.
  """
  D = query.shape[-1]
  walk = Walk(split, split.grid(query), tile.block_k, group_bias * LOG2_E, max_window)
  rows = operand_smem((WORKERS, ROWS, D), query.dtype)
  return plgpu.kernel(
    functools.partial(_dq_kernel, walk=walk, scale=scale, interpret=interpret is not None),
    out_type=jax.ShapeDtypeStruct(query.shape, query.dtype),
    scratch_types=[
      Buffers(
        ring=KeyRing.scratch(tile.stages, tile.block_k, D, query.dtype),
        query=rows,
        dout=rows,
        rows_ready=plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS),
        rows_free=plgpu.Barrier(num_arrivals=WORKERS),
      )
    ],
    grid=(min(programs, math.prod(walk.grid)),),
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
  walk: Walk,
  scale: float,
  interpret: bool,
) -> None:
  warpgroup = lax.axis_index("warpgroup")
  key_tiles = functools.partial(walk.key_tiles, sources, spans_ref)

  @pl.when(warpgroup == WORKERS)
  def _load() -> None:
    plgpu.set_max_registers(40, action="decrease")

    def load_tile(place: Place, tiles_before: Array, steps: Array) -> Array:
      pl.when(tiles_before > 0)(lambda: plgpu.barrier_wait(buffers.rows_free))
      for worker in range(WORKERS):
        rows = walk.split.query_slice(place, worker)
        for ref, smem in ((q_ref, buffers.query), (dout_ref, buffers.dout)):
          plgpu.copy_gmem_to_smem(ref.at[rows], smem.at[worker], buffers.rows_ready.at[worker])
      return key_tiles(place, functools.partial(buffers.ring.load, place), steps)

    steps = walk.tiles_of_work(spans_ref, load_tile)
    plgpu.barrier_wait(buffers.rows_free)
    buffers.ring.drain(steps)

  @pl.when(warpgroup < WORKERS)
  def _compute() -> None:
    plgpu.set_max_registers(232, action="increase")
    smem = buffers.query.at[warpgroup]

    def compute_tile(place: Place, tiles_before: Array, steps: Array) -> Array:
      del tiles_before
      rows = walk.split.query_slice(place, warpgroup)
      batch, queries, head = rows
      lse2_Q, delta_Q = (
        plgpu.load(ref.at[batch, head, queries], layout=ROW_LAYOUT, optimized=False)
        for ref in (lse2_ref, delta_ref)
      )
      plgpu.barrier_wait(buffers.rows_ready.at[warpgroup])
      step = functools.partial(
        _add_tile, buffers, place, queries, lse2_Q, delta_Q, scale * LOG2_E, interpret
      )
      carry = (zero_accumulator(smem.shape[-1]), steps)
      dq_QxD, steps = key_tiles(place, step, carry)
      smem[...] = (dq_QxD * scale).astype(smem.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(smem, dq_ref.at[rows])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.barrier_arrive(buffers.rows_free)
      return steps

    walk.tiles_of_work(spans_ref, compute_tile)
    plgpu.wait_smem_to_gmem(0)


def _add_tile(
  buffers: Buffers,
  place: Place,
  queries: Any,
  lse2_Q: Array,
  delta_Q: Array,
  scale2: float,
  interpret: bool,
  source: KVSourceRef,
  bias2: float,
  first: Array,
  masked: bool,
  carry: tuple[Array, Array],
) -> tuple[Array, Array]:
  """One worker's queries against one key tile."""
  dq_QxD, step = carry
  worker = lax.axis_index("warpgroup")
  ring = buffers.ring
  slot = ring.slot(step)
  shape = (ROWS, ring.key.shape[1])
  plgpu.barrier_wait(ring.key_ready.at[slot])
  plgpu.barrier_wait(ring.value_ready.at[slot])

  def products(logits_ref: Any, dp_ref: Any) -> tuple[Array, Array]:
    keys, values = (x.at[slot].transpose((1, 0)) for x in (ring.key, ring.value))
    plgpu.wgmma(logits_ref, buffers.query.at[worker], keys)
    plgpu.wgmma(dp_ref, buffers.dout.at[worker], values)
    # The exponentials run under the second product.
    logits_QxK = plgpu.wgmma_accumulator_load(logits_ref, wait_n=1)
    shift_QxK = lax.broadcast_in_dim(lse2_Q - bias2, shape, [0])
    p_QxK = jnp.exp2(logits_QxK * scale2 - shift_QxK)
    return p_QxK, dp_ref[...]

  acc = plgpu.ACC(shape, jnp.float32)
  p_QxK, dp_QxK = pl.run_scoped(products, acc, acc)
  plgpu.barrier_arrive(ring.value_free.at[slot])
  if masked:
    start_Q, end_Q = load_bounds(source, (place.batch, place.bound_head, queries), ROW_LAYOUT)
    p_QxK = jnp.where(seen_mask(start_Q, end_Q, first, shape, query_axis=0), p_QxK, 0.0)
  ds_QxK = p_QxK * (dp_QxK - lax.broadcast_in_dim(delta_Q, shape, [0]))
  ds_QxK = ds_QxK.astype(ring.key.dtype)
  dq_QxD = add_product(dq_QxD, ds_QxK, ring.key.at[slot], interpret=interpret)
  plgpu.barrier_arrive(ring.key_free.at[slot])
  return dq_QxD, step + 1
