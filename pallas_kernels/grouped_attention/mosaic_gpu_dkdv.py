"""Key and value gradients of one key source for Hopper, written in Pallas Mosaic GPU.

A program holds 128 entries, 64 a computing warpgroup, while a third warpgroup loads the queries
that see them, tile by tile, head by head. All products are transposed: entries are rows.
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
from pallas_kernels.grouped_attention.kv_sources import KVSource, KVSourceRef
from pallas_kernels.grouped_attention.mosaic_gpu_pipeline import (
  add_product,
  COLUMN_LAYOUT,
  COMPILER_PARAMS,
  load_bounds,
  operand_smem,
  ROWS,
  seen_mask,
  WORKERS,
  zero_accumulator,
)
from pallas_kernels.grouped_attention.tile_ranges import LOG2_E, loop_span, Span

ENTRIES = ROWS * WORKERS  # of one program


class QueryRing(NamedTuple):
  """Query tiles on their way: `ready` is loaded, `free` is read by both workers."""

  query: Any  # [stages, Q, D]
  dout: Any  # [stages, Q, D]
  lse2: Any  # [stages, Q]
  delta: Any  # [stages, Q]
  query_ready: Any  # with lse2
  dout_ready: Any  # with delta
  free: Any

  def slot(self, step: Array) -> Array:
    """The stage that holds the query tile number `step`."""
    return lax.rem(step, jnp.int32(self.query.shape[0]))


class Buffers(NamedTuple):
  """Shared memory and barriers of one program. The results take the entries' place."""

  ring: QueryRing
  key: Any  # [WORKERS, ROWS, D]
  value: Any  # [WORKERS, ROWS, D]
  entries_ready: Any
  entries_free: Any


class Tile(NamedTuple):
  """A tile of work: entries of one KV head against `heads` query heads from `head` on."""

  batch: Array
  kv_head: Array
  bound_head: Array | int
  entry: Array
  part: Array
  head: Array


class KeyWalk(NamedTuple):
  """The order in which all warpgroups of a program go through its work. Static."""

  grid: tuple[int, int, int]  # tiles of entries, batch, groups of query heads
  heads: int  # query heads of a tile of work
  heads_per_kv: int
  block_q: int

  def tiles_of_work(self, spans_ref: Any, body: Any) -> Array:
    """Calls body(tile, its span, tiles before, query tiles before) -> query tiles after."""

    @plgpu.nd_loop(self.grid, collective_axes="program", init_carry=jnp.int32(0))
    def steps(info: Any, carry: Array) -> Array:
      # Early entries are seen by most queries: they go first.
      number, batch, part = info.index
      head = part * self.heads
      kv_head = lax.div(head, jnp.int32(self.heads_per_kv))
      bound_head = 0 if spans_ref.shape[1] == 1 else kv_head
      span = Span(*(spans_ref[batch, bound_head, number, i] for i in range(4)))
      tile = Tile(batch, kv_head, bound_head, number * ENTRIES, part, head)
      return body(tile, span, info.local_index, carry)

    return steps

  def query_tiles(self, tile: Tile, span: Span, body: Any, carry: Any) -> Any:
    """Calls body(head, first query, masked, carry) for all that see the tile."""

    def one_head(i: Array, carry: Any) -> Any:
      step = functools.partial(body, tile.head + i)
      return loop_span(span, self.block_q, step, carry)

    return lax.fori_loop(0, self.heads, one_head, carry)


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
  heads: int,
  tile: MosaicKeyTile,
  programs: int,
  name: str,
  interpret: Any = None,
) -> tuple[Array, Array]:
  """dk and dv of one source, summed over `heads` query heads each: [B, S, H / heads, D].

  In the operands' dtype where that is all of a KV head's, else in float32. S is padded to a
  multiple of 128 entries. Bounds hold tile.block_q more queries than L; spans: `query_spans`.
  The name is the source's, for profiles.
  """
  B, _, H, D = query.shape
  _, S, N, _ = source.key.shape
  dtype = query.dtype
  whole = heads == H // N
  walk = KeyWalk((math.ceil(S / ENTRIES), B, H // heads), heads, H // N, tile.block_q)
  partial = jax.ShapeDtypeStruct(
    (B, walk.grid[0] * ENTRIES, H // heads, D), dtype if whole else jnp.float32
  )
  stages, block_q = tile.stages, tile.block_q
  queries = operand_smem((stages, block_q, D), dtype)
  numbers = plgpu.SMEM((stages, block_q), jnp.float32)
  entries = operand_smem((WORKERS, ROWS, D), dtype)
  return plgpu.kernel(
    functools.partial(
      _dkdv_kernel,
      walk=walk,
      scale=scale,
      bias2=bias * LOG2_E,
      interpret=interpret is not None,
    ),
    out_type=(partial, partial),
    scratch_types=[
      Buffers(
        ring=QueryRing(
          queries,
          queries,
          numbers,
          numbers,
          query_ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
          dout_ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
          free=plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
        ),
        key=entries,
        value=entries,
        entries_ready=plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS),
        entries_free=plgpu.Barrier(num_arrivals=WORKERS),
      )
    ],
    grid=(min(programs, math.prod(walk.grid)),),
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
  walk: KeyWalk,
  scale: float,
  bias2: float,
  interpret: bool,
) -> None:
  warpgroup = lax.axis_index("warpgroup")
  ring = buffers.ring

  @pl.when(warpgroup == WORKERS)
  def _load() -> None:
    plgpu.set_max_registers(40, action="decrease")

    def load_tile(tile: Tile, span: Span, tiles_before: Array, steps: Array) -> Array:
      pl.when(tiles_before > 0)(lambda: plgpu.barrier_wait(buffers.entries_free))
      for worker in range(WORKERS):
        entries = (tile.batch, pl.ds(tile.entry + worker * ROWS, ROWS), tile.kv_head)
        for ref, smem in ((source.key, buffers.key), (source.value, buffers.value)):
          plgpu.copy_gmem_to_smem(
            ref.at[entries], smem.at[worker], buffers.entries_ready.at[worker]
          )
      load = functools.partial(_load_queries, ring, tile, q_ref, dout_ref, lse2_ref, delta_ref)
      return walk.query_tiles(tile, span, load, steps)

    steps = walk.tiles_of_work(spans_ref, load_tile)
    plgpu.barrier_wait(buffers.entries_free)
    for stage in range(ring.query.shape[0]):
      pl.when(steps > stage)(functools.partial(plgpu.barrier_wait, ring.free.at[stage]))

  @pl.when(warpgroup < WORKERS)
  def _compute() -> None:
    plgpu.set_max_registers(232, action="increase")

    def compute_tile(tile: Tile, span: Span, tiles_before: Array, steps: Array) -> Array:
      del tiles_before
      plgpu.barrier_wait(buffers.entries_ready.at[warpgroup])
      zeros = zero_accumulator(buffers.key.shape[-1])
      step = functools.partial(
        _add_queries, buffers, source, tile, scale * LOG2_E, bias2, interpret
      )
      carry = (zeros, zeros, steps)
      dk_KxD, dv_KxD, steps = walk.query_tiles(tile, span, step, carry)
      _write(buffers, tile, dk_ref, dv_ref, dk_KxD * scale, dv_KxD)
      plgpu.barrier_arrive(buffers.entries_free)
      return steps

    walk.tiles_of_work(spans_ref, compute_tile)
    plgpu.wait_smem_to_gmem(0)


def _load_queries(
  ring: QueryRing,
  tile: Tile,
  q_ref: Any,
  dout_ref: Any,
  lse2_ref: Any,
  delta_ref: Any,
  head: Array,
  first: Array,
  masked: bool,
  step: Array,
) -> Array:
  """Fills the next stage once it is free."""
  del masked
  stages, block_q, _ = ring.query.shape
  slot = ring.slot(step)
  pl.when(step >= stages)(lambda: plgpu.barrier_wait(ring.free.at[slot]))
  rows = pl.ds(first, block_q)
  for ref, at, smem, ready in (
    (q_ref, (tile.batch, rows, head), ring.query, ring.query_ready),
    (lse2_ref, (tile.batch, head, rows), ring.lse2, ring.query_ready),
    (dout_ref, (tile.batch, rows, head), ring.dout, ring.dout_ready),
    (delta_ref, (tile.batch, head, rows), ring.delta, ring.dout_ready),
  ):
    plgpu.copy_gmem_to_smem(ref.at[at], smem.at[slot], ready.at[slot])
  return step + 1


def _add_queries(
  buffers: Buffers,
  source: KVSourceRef,
  tile: Tile,
  scale2: float,
  bias2: float,
  interpret: bool,
  head: Array,
  first: Array,
  masked: bool,
  carry: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
  """One worker's entries against one query tile of one head."""
  del head
  dk_KxD, dv_KxD, step = carry
  worker = lax.axis_index("warpgroup")
  ring = buffers.ring
  slot = ring.slot(step)
  shape = (ROWS, ring.query.shape[1])

  def products(logits_ref: Any, dp_ref: Any) -> tuple[Array, Array]:
    queries, douts = (x.at[slot].transpose((1, 0)) for x in (ring.query, ring.dout))
    plgpu.barrier_wait(ring.query_ready.at[slot])
    plgpu.wgmma(logits_ref, buffers.key.at[worker], queries)
    plgpu.barrier_wait(ring.dout_ready.at[slot])
    plgpu.wgmma(dp_ref, buffers.value.at[worker], douts)
    # The exponentials run under the second product.
    logits_KxQ = plgpu.wgmma_accumulator_load(logits_ref, wait_n=1)
    lse2_Q = plgpu.load(ring.lse2.at[slot], layout=COLUMN_LAYOUT)
    shift_KxQ = lax.broadcast_in_dim(lse2_Q - bias2, shape, [1])
    p_KxQ = jnp.exp2(logits_KxQ * scale2 - shift_KxQ)
    return p_KxQ, dp_ref[...]

  acc = plgpu.ACC(shape, jnp.float32)
  p_KxQ, dp_KxQ = pl.run_scoped(products, acc, acc)
  if masked:
    at = (tile.batch, tile.bound_head, pl.ds(first, shape[1]))
    start_Q, end_Q = load_bounds(source, at, COLUMN_LAYOUT)
    entry = tile.entry + worker * ROWS
    p_KxQ = jnp.where(seen_mask(start_Q, end_Q, entry, shape, query_axis=1), p_KxQ, 0.0)
  delta_Q = plgpu.load(ring.delta.at[slot], layout=COLUMN_LAYOUT)
  ds_KxQ = p_KxQ * (dp_KxQ - lax.broadcast_in_dim(delta_Q, shape, [1]))
  dtype = ring.query.dtype
  dv_KxD = add_product(dv_KxD, p_KxQ.astype(dtype), ring.dout.at[slot], interpret=interpret)
  dk_KxD = add_product(dk_KxD, ds_KxQ.astype(dtype), ring.query.at[slot], interpret=interpret)
  plgpu.barrier_arrive(ring.free.at[slot])
  return dk_KxD, dv_KxD, step + 1


def _write(
  buffers: Buffers, tile: Tile, dk_ref: Any, dv_ref: Any, dk_KxD: Array, dv_KxD: Array
) -> None:
  """Sends one worker's sums off; on return its shared memory is free."""
  worker = lax.axis_index("warpgroup")
  at = (tile.batch, pl.ds(tile.entry + worker * ROWS, ROWS), tile.part)
  if dk_ref.dtype == jnp.float32:  # too wide for the entries' place
    dk_ref[at] = dk_KxD
    dv_ref[at] = dv_KxD
    return
  for ref, smem, x_KxD in ((dk_ref, buffers.key, dk_KxD), (dv_ref, buffers.value, dv_KxD)):
    smem.at[worker][...] = x_KxD.astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.at[worker], ref.at[at])
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
