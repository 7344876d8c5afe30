"""What the TPU kernels share: how arrays lie, and which tiles of queries and entries meet.

A tile of queries holds several query heads of one KV head, stacked as rows, so that keys and
values are loaded once for them. It meets two arrays of entries, the summaries, which are
[focal | groups] in one array, and the window:

- its edges, in one step and under a mask: the last tile of focal entries and of groups that any of
  its queries sees, and the piece of the window that they see;
- the tiles of summaries that all of its queries see whole, without a mask;
- rarely, further tiles under a mask, where documents packed in a row begin or end in the tile.

Summaries come in blocks, which hold many tiles: a block that the queries do not see is not loaded.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.grouped_attention.kv_sources import KVSources
from pallas_kernels.grouped_attention.mosaic_tpu_blocks import KeyTile, TpuBlocks
from pallas_kernels.mosaic_tpu_common import LANES

FIELDS = 8  # rows of packed bounds: six are used, eight fill a register
FOCAL, GROUP, WINDOW = 0, 2, 4  # the row of a source's start; its end follows
LN_2 = 0.6931471805599453
MAX_QUERIES = 512  # of a tile: more would see too much of the window that each does not
MAX_PIECE = 1024  # entries of a piece of the window


@dataclasses.dataclass(frozen=True)
class GradTile:
  """Of a kernel that holds entries: entries, queries that meet them, and queries loaded a step."""

  block_k: int
  block_q: int
  piece: int

  @classmethod
  def of(cls, tile: KeyTile, heads: int, length: int) -> "GradTile":
    """For tiles of so many heads."""
    block_q = queries_of(tile.rows, heads, length)
    return cls(tile.block_k, block_q, tile.tiles * block_q)


@dataclasses.dataclass(frozen=True)
class Walk:
  """Static sizes of one call."""

  heads: int  # query heads of a tile
  splits: int  # such tiles for one KV head
  edge_heads: int  # of a tile's heads, how many are computed at once at the edges
  block_q: int  # queries of a tile; it has `heads` times as many rows
  block_k: int  # entries of a tile of summaries
  block: int  # entries of a block of summaries, a multiple of block_k
  window: int  # entries of a piece of the window
  group_offset: int  # where groups begin among the summaries, a multiple of block_k
  summaries: int  # entries of all blocks
  shared_bounds: bool
  scale2: float  # of logits, which are for exp2
  group_bias2: float  # added to those of groups
  summary_grad: GradTile
  window_grad: GradTile

  @classmethod
  def of(
    cls,
    blocks: TpuBlocks,
    *,
    dtype: Any,
    head_dim: int,
    heads_per_kv: int,
    length: int,
    focal: int,
    groups: int,
    max_window: int,
    shared_bounds: bool,
    scale2: float,
    group_bias2: float,
  ) -> "Walk":
    """For arrays of these sizes."""
    # As many heads of a KV head as leave them LANES queries each.
    heads = max(
      g for g in range(1, heads_per_kv + 1) if heads_per_kv % g == 0 and g * LANES <= blocks.rows
    )
    block_q = queries_of(blocks.rows, heads, length)
    edge_heads = max(
      g
      for g in range(1, heads + 1)
      if heads % g == 0 and (g == 1 or g * block_q <= blocks.edge_rows)
    )
    tile = max(blocks.block_k, blocks.summary_grad.block_k)
    group_offset = round_up(max(focal, 1), tile)
    needed = group_offset + round_up(max(groups, 1), tile)
    at_once = max(blocks.summaries // (head_dim * dtype.itemsize), tile)
    count = -(-needed // at_once)
    block = round_up(-(-needed // count), tile)
    # The first entry of a piece is rounded down.
    window = round_up(block_q + max_window + row_unit(dtype) - 2, LANES)
    return cls(
      heads=heads,
      splits=heads_per_kv // heads,
      edge_heads=edge_heads,
      block_q=block_q,
      block_k=blocks.block_k,
      block=block,
      window=min(window, MAX_PIECE),
      group_offset=group_offset,
      summaries=count * block,
      shared_bounds=shared_bounds,
      scale2=scale2,
      group_bias2=group_bias2,
      summary_grad=GradTile.of(blocks.summary_grad, heads, length),
      window_grad=GradTile.of(blocks.window_grad, heads, length),
    )

  @property
  def rows(self) -> int:
    """Of a tile of queries."""
    return self.heads * self.block_q

  @property
  def tiles_per_block(self) -> int:
    """Tiles of summaries in a block."""
    return self.block // self.block_k

  def scalar_bytes(self, bounds: int, length: int) -> int:
    """Scalar memory that kernels need for `bounds` rows of bounds."""
    tiles = -(-length // self.block_q)
    entries = max(
      self.summaries // self.summary_grad.block_k, -(-length // self.window_grad.block_k)
    )
    return 4 * bounds * max(_NUMBERS * tiles, 4 * entries)


class Operands(NamedTuple):
  """The arrays of a call as kernels take them, heads before positions.

  P = N · splits, query heads in tiles of G. Keys of summaries carry the scale of logits.
  """

  query: Array  # [B, P, G, L, D]
  summary_key: Array  # [B, N, S, D]
  summary_value: Array
  window_key: Array  # [B, N, W, D]
  window_value: Array
  bounds: Any  # [B, n, FIELDS, L] int32, groups count from group_offset; None among gradients


def queries_of(rows: int, heads: int, length: int) -> int:
  """Queries of a tile of so many heads and about so many rows: a power of two, LANES at least."""
  most = min(rows // heads, MAX_QUERIES, max(length, LANES))
  return max(1 << (most.bit_length() - 1), LANES)


def round_up(x: int, unit: int) -> int:
  """The next multiple of unit."""
  return -(-x // unit) * unit


def row_unit(dtype: Any) -> int:
  """Rows of one packed register: pieces of an array begin at multiples of it."""
  return 32 // jnp.dtype(dtype).itemsize


def pad_to(x: Array, axis: int, size: int, *, mode: str = "constant") -> Array:
  """Pads an axis at its end up to `size`."""
  if x.shape[axis] >= size:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths, mode=mode)


def pack_bounds(sources: KVSources, group_offset: int, length: int) -> Array:
  """[B, n, FIELDS, length] int32; queries past the end repeat the last one's bounds."""
  shifts = (0, 0, group_offset, group_offset, 0, 0)
  ranges = [x for source in sources for x in (source.start, source.end)]
  fields = [x.astype(jnp.int32) + shift for x, shift in zip(ranges, shifts, strict=True)]
  fields += [jnp.zeros_like(fields[0])] * (FIELDS - len(fields))
  return pad_to(jnp.stack(fields, axis=2), 3, length, mode="edge")


class Run(NamedTuple):
  """Tiles of one source of summaries that a tile of queries visits.

  All queries see tiles [whole_from, whole_to) whole. Those of [first, whole_from), of [whole_to,
  edge) and the tile `edge` are masked.
  """

  first: Any
  whole_from: Any
  whole_to: Any
  edge: Any

  @classmethod
  def of(cls, first: Array, last: Array, source: int, block: int) -> "Run":
    """From the bounds of the first and the last query of each tile, [B, n, FIELDS, tiles]."""
    start, end = first[:, :, source], last[:, :, source + 1]
    visited = start // block
    # A tile without a visible entry still reads one as its edge.
    edge = jnp.where(end > start, -(-end // block) - 1, visited)
    whole_from = jnp.clip(-(-last[:, :, source] // block), visited, edge)
    whole_to = jnp.clip(first[:, :, source + 1] // block, whole_from, edge)
    return cls(visited, whole_from, whole_to, edge)

  def inside(self, low: Any, high: Any) -> "Run":
    """Its part in tiles [low, high); there the edge is only where the masked tiles end."""
    return Run(*(jnp.clip(x, low, high) for x in self))


class Blocks(NamedTuple):
  """Blocks of summaries that a tile of queries visits: a run of focal ones, one of groups."""

  focal_from: Any
  focal_count: Any
  group_from: Any
  count: Any

  @classmethod
  def of(cls, focal: Run, group: Run, walk: Walk) -> "Blocks":
    """Those that hold the tiles before the edges. None is visited twice."""
    per = jnp.int32(walk.tiles_per_block)
    runs = []
    for run in (focal, group):
      start = lax.div(run.first, jnp.full_like(run.first, per))
      end = lax.div(run.edge + (per - 1), jnp.full_like(run.first, per))
      runs += [start, jnp.where(run.edge > run.first, end, start)]
    focal_from, focal_to, group_from, group_to = runs
    focal_count = focal_to - focal_from
    group_from = jnp.where(focal_count > 0, jnp.maximum(group_from, focal_to), group_from)
    count = focal_count + jnp.maximum(group_to - group_from, 0)
    return cls(focal_from, focal_count, group_from, count)

  def at(self, step: Any) -> Any:
    """The block of a step; steps after the last one stay there, which loads nothing."""
    step = jnp.clip(step, 0, jnp.maximum(self.count - 1, 0))
    return jnp.where(
      step < self.focal_count, self.focal_from + step, self.group_from + step - self.focal_count
    )


class Visits(NamedTuple):
  """What one tile of queries visits."""

  focal: Run
  group: Run
  blocks: Blocks
  window_from: Any  # first entry of the first piece of the window
  pieces: Any

  def piece(self, step: Any, walk: Walk) -> Any:
    """First entry of a step's piece of the window; steps after the last one stay there."""
    step = jnp.clip(step, 0, jnp.maximum(self.pieces - 1, 0))
    return self.window_from + step * walk.window


_NUMBERS = 14  # in a tile's Visits


def pack_visits(bounds: Array, walk: Walk, dtype: Any) -> tuple[Array, Array]:
  """The `Visits` of all tiles of queries, [B, n, tiles * _NUMBERS], and the most steps of any.

  Bounds never decrease along a tile, so its first and last query tell everything.
  """
  first, last = bounds[..., :: walk.block_q], bounds[..., walk.block_q - 1 :: walk.block_q]
  focal, group = (Run.of(first, last, source, walk.block_k) for source in (FOCAL, GROUP))
  unit = row_unit(dtype)
  window_from = first[:, :, WINDOW] // unit * unit
  seen = jnp.maximum(last[:, :, WINDOW + 1] - window_from, 0)
  blocks = Blocks.of(focal, group, walk)
  visits = Visits(focal, group, blocks, window_from, -(-seen // walk.window))
  numbers = jnp.stack([*focal, *group, *blocks, window_from, visits.pieces], axis=-1)
  steps = jnp.maximum(jnp.maximum(blocks.count, visits.pieces).max(), 1)
  B, n, tiles, _ = numbers.shape
  return numbers.reshape(B, n, tiles * _NUMBERS).astype(jnp.int32), steps.astype(jnp.int32)


def unpack_visits(packed: Array) -> Visits:
  """The inverse: arrays [B, n, tiles]."""
  numbers = packed.reshape(*packed.shape[:2], -1, _NUMBERS)
  return _visits([numbers[..., i] for i in range(_NUMBERS)])


def read_visits(ref: Any, walk: Walk, b: Any, p: Any, t: Any) -> Visits:
  """The `Visits` of tile t of head tile p of row b, from the packed ones in scalar memory."""
  n = 0 if walk.shared_bounds else lax.div(p, jnp.int32(walk.splits))
  return _visits([ref[b, n, t * _NUMBERS + i] for i in range(_NUMBERS)])


def _visits(x: list[Any]) -> Visits:
  return Visits(Run(*x[:4]), Run(*x[4:8]), Blocks(*x[8:12]), x[12], x[13])


def pack_query_runs(
  bounds: Array, source: int, first_entry: int, entries: int, tile: GradTile
) -> Array:
  """Per tile of entries the `Run` of tiles of queries that see it: [B, n, 4, tiles] int32.

  Here tiles [first, edge) are visited; the edge is none of them.

  Args:
    bounds: packed ones.
    source: the row of theirs that holds for the entries.
    first_entry: which the first entry is by these bounds.
    entries: how many there are.
    tile: sizes of the tiles.
  """
  start, end = bounds[:, :, source], bounds[:, :, source + 1]
  begins_E = first_entry + jnp.arange(0, entries, tile.block_k, dtype=jnp.int32)

  def count(seen_BxnxExT: Array) -> Array:
    return seen_BxnxExT.sum(axis=-1, dtype=jnp.int32)

  # Bounds never decrease, so that tiles with a property are counted instead of searched.
  first, last = (
    (start[..., None, at :: tile.block_q], end[..., None, at :: tile.block_q])
    for at in (0, tile.block_q - 1)
  )
  from_Ex1 = begins_E[None, None, :, None]
  to_Ex1 = from_Ex1 + tile.block_k
  visited_from = count(last[1] <= from_Ex1)
  edge = jnp.maximum(count(first[0] < to_Ex1), visited_from)
  whole_from = jnp.clip(count(first[1] < to_Ex1), visited_from, edge)
  whole_to = jnp.clip(count(last[0] <= from_Ex1), whole_from, edge)
  return jnp.stack([visited_from, whole_from, whole_to, edge], axis=2)
