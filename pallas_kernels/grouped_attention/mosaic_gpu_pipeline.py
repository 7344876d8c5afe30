"""What the Mosaic GPU kernels share: the schedule of the work, and the pipeline of K and V tiles.

A program has three warpgroups: the WORKERS compute, and one more loads. All of them go through the
same tiles of work in the same order, so no tile has to be announced.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_attention.kv_sources import KVSourceRef, KVSourcesRef, Runs
from pallas_kernels.grouped_attention.tile_ranges import (
  dealt_tile,
  loop_span,
  num_dealt_tiles,
  ROW_UNIT,
  Span,
)

WORKERS = 2  # warpgroups that compute; one more loads
ROW_SLOTS = 2  # tiles of work whose queries fit the shared memory: one is computed, one is loaded
ROWS = 64  # rows of one worker: the height of a warpgroup's matrix product
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)  # one number for each row of a product
COLUMN_LAYOUT = plgpu.Layout.WGMMA.reduce(0)  # ... for each column

# All layouts are written out: the lowering would search for them for minutes. A row of a product
# belongs to one warp, so reductions over columns need no scratch in shared memory.
COMPILER_PARAMS = plgpu.CompilerParams(
  approx_math=True,
  lowering_semantics=plgpu.LoweringSemantics.Lane,
  reduction_scratch_bytes=0,
)


def operand_smem(shape: tuple[int, ...], dtype: Any) -> Any:
  """Shared memory in the layout that the TMA unit writes and the tensor cores read."""
  tiling = plgpu.TilingTransform((ROW_UNIT, 64))  # type: ignore[abstract]
  swizzle = plgpu.SwizzleTransform(128)  # type: ignore[abstract]
  return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def pcast_like[T](x: Array, results: T) -> T:
  """Kernel results, marked inside a shard_map as varying over the mesh axes of x."""

  def varying(x: Array) -> frozenset[Any]:
    return jax.typeof(x).manual_axis_type.varying

  def mark(result: Array) -> Array:
    axes = tuple(varying(x) - varying(result))
    return lax.pcast(result, axes, to="varying") if axes else result

  return jax.tree.map(mark, results)


def work_loop(
  grid: tuple[int, int, int],
  runs: Runs,
  body: Callable[[tuple[Array, ...], Array, Array], Array],
) -> Array:
  """Calls body(grid index, tiles before, carry) -> carry for every tile of work of this program.

  Tiles are dealt to the programs by `dealt_tile`, for which the cost of tiles falls along the grid,
  and from run to run of the last axis. The carry is int32 and begins at 0.
  """
  program, programs = lax.axis_index("program"), lax.axis_size("program")

  def step(turn: Array, carry: Array) -> Array:
    return body(grid_index(dealt_tile(turn, program, programs), grid, runs), turn, carry)

  turns = num_dealt_tiles(math.prod(grid), program, programs)
  return lax.fori_loop(jnp.int32(0), turns, step, jnp.int32(0))


def grid_index(tile: Array, grid: tuple[int, int, int], runs: Runs) -> tuple[Array, ...]:
  """The index of tile number `tile` of a grid whose last axis is visited run by run."""
  steps, batch, _ = grid

  def in_run(tile: Array, first: int, count: int) -> list[Array]:
    index: list[Array] = []
    for size in (count, batch, steps):
      index.insert(0, lax.rem(tile, jnp.int32(size)))
      tile = lax.div(tile, jnp.int32(size))
    return [*index[:2], index[2] + first] if first else index

  index, before = in_run(tile, *runs[0]), steps * batch * runs[0][1]
  for run in runs[1:]:
    # The sign bit, in place of a choice: tiles of a later run replace the index.
    is_later = lax.shift_right_logical(jnp.int32(before - 1) - tile, jnp.int32(31))
    later = in_run(tile - before, *run)
    index = [old + is_later * (new - old) for new, old in zip(later, index, strict=True)]
    before += steps * batch * run[1]
  return tuple(index)


def scaled_runs(runs: Runs | None, heads: int, numerator: int, denominator: int = 1) -> Runs:
  """Runs of KV heads as runs of an axis with numerator / denominator entries for each head."""
  runs = runs or ((0, heads),)
  return tuple((a * numerator // denominator, n * numerator // denominator) for a, n in runs)


class TileCoords(NamedTuple):
  """Coordinates of a tile of work; `row` and `head` are those of the first worker."""

  batch: Array
  kv_head: Array
  bound_head: Array | int  # index into the KV heads of the ranges
  tile: Array
  row: Array
  head: Array

  def span(self, spans_ref: Any, source: int) -> Span:
    """The keys of a source that the tile sees; spans_ref [B, n, tiles, 12]."""
    at = (self.batch, self.bound_head, self.tile)
    return Span(*(spans_ref[(*at, 4 * source + i)] for i in range(4)))


class WorkSplit(NamedTuple):
  """How the two workers share a tile of work.

  If an even number of query heads shares a KV head, the workers take two heads of the same
  queries: the tile then spans fewer queries, and fewer of its key tiles need a mask. Otherwise
  they take two blocks of queries of one head.
  """

  heads: int  # query heads of a tile, 1 or 2
  heads_per_kv: int

  @classmethod
  def for_heads(cls, num_heads: int, num_kv_heads: int) -> "WorkSplit":
    """The split for H query heads over N KV heads."""
    heads_per_kv = num_heads // num_kv_heads
    return cls(2 if heads_per_kv % 2 == 0 else 1, heads_per_kv)

  @property
  def queries(self) -> int:
    """Queries that a tile spans."""
    return ROWS * WORKERS // self.heads

  def grid(self, query: jax.Array) -> tuple[int, int, int]:
    """The number of tiles of queries, batch entries and groups of heads."""
    B, L, H, _ = query.shape
    return math.ceil(L / self.queries), B, H // self.heads

  def runs(self, runs: Runs | None, num_kv_heads: int) -> Runs:
    """Runs of KV heads as runs of groups of heads."""
    return scaled_runs(runs, num_kv_heads, self.heads_per_kv, self.heads)

  def coords(
    self, index: tuple[Array, ...], grid: tuple[int, int, int], bound_heads: int
  ) -> TileCoords:
    """The tile of work at a grid index. Late queries see most, so they go first."""
    step, batch, heads = index
    tile = grid[0] - 1 - step
    head = heads * self.heads
    kv_head = lax.div(head, jnp.int32(self.heads_per_kv))
    bound_head = 0 if bound_heads == 1 else kv_head
    return TileCoords(batch, kv_head, bound_head, tile, tile * self.queries, head)

  def query_slice(self, coords: TileCoords, worker: Array | int) -> tuple[Array, Any, Array]:
    """The index of a worker's queries in [B, L, H, D]."""
    row = coords.row + worker * (ROWS if self.heads == 1 else 0)
    head = coords.head + worker * (self.heads - 1)
    return coords.batch, pl.ds(row, ROWS), head


class TileBody(NamedTuple):
  """What a warpgroup does with the key tiles of one source."""

  tile: Callable[[Array, bool, Any], Any]  # (first key, masked, carry) -> carry
  # (count, carry) -> carry: consecutive tiles without a mask. None calls `tile` for each.
  full_tiles: Callable[[Array, Any], Any] | None = None


class TileSchedule(NamedTuple):
  """The order in which all warpgroups of a program go through its work. Static."""

  split: WorkSplit
  grid: tuple[int, int, int]
  runs: Runs  # of the groups of heads
  block_k: int
  group_bias2: float
  max_window: int
  has_keys: tuple[bool, bool, bool]  # False for a source without keys, which is left out
  has_half_tiles: bool  # whether the kernel takes key tiles of half the width

  def tiles_of_work(self, spans_ref: Any, body: Callable[..., Array]) -> Array:
    """Calls body(coords, tiles of work before, key tiles before) -> key tiles after."""

    def tile(index: tuple[Array, ...], tiles_before: Array, carry: Array) -> Array:
      return body(self.split.coords(index, self.grid, spans_ref.shape[1]), tiles_before, carry)

    return work_loop(self.grid, self.runs, tile)

  def tiles_of_program(self) -> Array:
    """How many tiles of work this program has."""
    program, programs = lax.axis_index("program"), lax.axis_size("program")
    return num_dealt_tiles(math.prod(self.grid), program, programs)

  def key_tiles(
    self,
    sources: KVSourcesRef,
    spans_ref: Any,
    coords: TileCoords,
    body_of: Callable[[KVSourceRef, float, int], TileBody],
    carry: Any,
  ) -> Any:
    """Runs body_of(source, its bias, keys of a tile) over the key tiles that are seen.

    With `has_half_tiles` a last tile of which few keys are seen is half as wide.
    """
    for i, source in enumerate(sources):
      if not self.has_keys[i]:
        continue
      bias2 = self.group_bias2 if i == 1 else 0.0
      narrow = i == 2 and self.max_window < self.block_k
      # The tensor cores sum over a multiple of 64 keys.
      has_half = self.has_half_tiles and not narrow and self.block_k % 128 == 0
      body = body_of(source, bias2, self.block_k)
      carry = loop_span(
        coords.span(spans_ref, i),
        self.block_k,
        body.tile,
        carry,
        has_full_tiles=not narrow,
        full_tiles=body.full_tiles,
        half_tile=body_of(source, bias2, self.block_k // 2).tile if has_half else None,
      )
    return carry


class KVPipeline(NamedTuple):
  """Stages of K and V tiles in shared memory, with two barriers each.

  `ready`: the tile is loaded. `free`: both workers have read it.
  """

  key: Any  # [stages, K, D]
  value: Any
  key_ready: Any
  key_free: Any
  value_ready: Any
  value_free: Any

  @classmethod
  def scratch(cls, stages: int, block_k: int, head_dim: int, dtype: Any) -> "KVPipeline":
    """The scratch types."""
    smem = operand_smem((stages, block_k, head_dim), dtype)
    ready = plgpu.Barrier(num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages)
    return cls(smem, smem, ready, free, ready, free)

  def slot(self, step: Array) -> Array:
    """The stage that holds the key tile number `step`."""
    return lax.rem(step, jnp.int32(self.key.shape[0]))

  def loads_of(self, coords: TileCoords, source: KVSourceRef, bias2: float, keys: int) -> TileBody:
    """The body for `TileSchedule.key_tiles` that loads a tile into the next free stage."""
    del bias2
    return TileBody(functools.partial(self._load, coords, source, keys))

  def _load(
    self,
    coords: TileCoords,
    source: KVSourceRef,
    keys: int,
    first: Array,
    masked: bool,
    step: Array,
  ) -> Array:
    """Loads into the next stage once that is free."""
    del masked
    stages, slot = self.key.shape[0], self.slot(step)
    rows = (coords.batch, pl.ds(first, keys), coords.kv_head)
    for ref, smem, free, ready in (
      (source.key, self.key, self.key_free, self.key_ready),
      (source.value, self.value, self.value_free, self.value_ready),
    ):
      pl.when(step >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
      plgpu.copy_gmem_to_smem(ref.at[rows], smem.at[slot, pl.ds(0, keys)], ready.at[slot])
    return step + 1

  def drain(self, steps: Array) -> None:
    """Waits until all stages are free, so that every barrier ends on a full phase."""
    for stage in range(self.key.shape[0]):

      @pl.when(steps > stage)
      def _(stage: int = stage) -> None:
        plgpu.barrier_wait(self.key_free.at[stage])
        plgpu.barrier_wait(self.value_free.at[stage])


class RowSlots(NamedTuple):
  """Slots for the queries of two tiles of work, so that loads run ahead of the computation.

  `ready`: the rows of a worker are loaded. `free`: both workers have read the slot.
  """

  ready: Any  # one for each slot and worker
  free: Any  # one for each slot

  @classmethod
  def scratch(cls, arrays: int) -> "RowSlots":
    """The scratch types, for `arrays` arrays of rows."""
    return cls(
      ready=plgpu.Barrier(num_arrivals=arrays, num_barriers=ROW_SLOTS * WORKERS),
      free=plgpu.Barrier(num_arrivals=WORKERS, num_barriers=ROW_SLOTS),
    )

  def slot(self, tiles_before: Array) -> Array:
    """The slot of the tile of work after `tiles_before` others."""
    return lax.rem(tiles_before, jnp.int32(ROW_SLOTS))

  def wait_until_free(self, tiles_before: Array) -> Array:
    """Waits until the slot of a tile of work is free; returns the slot."""
    slot = self.slot(tiles_before)
    pl.when(tiles_before >= ROW_SLOTS)(lambda: plgpu.barrier_wait(self.free.at[slot]))
    return slot

  def drain(self, tiles: Array) -> None:
    """Waits until all slots are free, after `tiles` tiles of work."""
    for slot in range(ROW_SLOTS):
      pl.when(tiles > slot)(functools.partial(plgpu.barrier_wait, self.free.at[slot]))


def row_vector(value: float) -> Array:
  """One float32 for each row of a product."""
  return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW_LAYOUT)


def zero_accumulator(columns: int) -> Array:
  """A sum of products, in registers, before the first one."""
  return plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)


def load_ranges(source: KVSourceRef, at: tuple[Any, ...], layout: Any) -> tuple[Array, Array]:
  """Start and end of the ranges of some queries."""
  return (
    plgpu.load(source.start.at[at], layout=layout, optimized=False),
    plgpu.load(source.end.at[at], layout=layout, optimized=False),
  )


def seen_mask(
  start: Array, end: Array, first_key: Array, shape: tuple[int, int], *, query_axis: int
) -> Array:
  """Bool of `shape`: whether a query sees a key, for keys from `first_key` on."""
  key = first_key + plgpu.broadcasted_iota(
    jnp.int32, shape, 1 - query_axis, layout=plgpu.Layout.WGMMA
  )
  start = lax.broadcast_in_dim(start, shape, [query_axis])
  end = lax.broadcast_in_dim(end, shape, [query_axis])
  return (start <= key) & (key < end)


def add_product(acc: Array, lhs: Array, rhs_smem: Any, *, interpret: bool) -> Array:
  """acc + lhs @ rhs on the tensor cores; lhs is in registers."""
  if interpret:
    # The interpreter has no run_state. It needs a fence after a plain read, as wgmma does not.
    product = lax.dot(lhs, rhs_smem[...], preferred_element_type=jnp.float32)
    plgpu.commit_smem()
    return acc + product

  def multiply(acc_ref: Any) -> None:
    plgpu.wgmma(acc_ref, lhs, rhs_smem)

  return pl.run_state(multiply)(plgpu.ACC.init(acc))


def add_products(
  accs: tuple[Array, ...], operands: tuple[tuple[Array, Any], ...], *, interpret: bool
) -> tuple[Array, ...]:
  """acc + lhs @ rhs of each pair, queued one behind another on the tensor cores.

  The left operands are in registers, which no instruction may write between the products.
  """
  if interpret:
    return tuple(
      add_product(acc, *pair, interpret=True) for acc, pair in zip(accs, operands, strict=True)
    )
  left = lax.optimization_barrier(tuple(lhs for lhs, _ in operands))

  def multiply(acc_refs: Any) -> None:
    for acc_ref, lhs, (_, rhs_smem) in zip(acc_refs, left, operands, strict=True):
      plgpu.wgmma(acc_ref, lhs, rhs_smem)

  return pl.run_state(multiply)(tuple(plgpu.ACC.init(acc) for acc in accs))
