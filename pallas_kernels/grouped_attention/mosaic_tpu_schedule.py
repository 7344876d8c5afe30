"""The schedule of the TPU kernels: static sizes, and which tiles of queries and keys meet.

A tile of queries holds several query heads of one KV head, stacked as rows, so that keys and
values are loaded once for all of them. It reads two arrays of keys, the summaries, which are
[focal | groups] in one array, and the window:

- its edges, in one masked step: the last tile of focal tokens and the last tile of groups that any
  of its queries sees, and the piece of the window that they see;
- the tiles of summaries that all of its queries see whole, without a mask;
- rarely, further masked tiles, if documents packed in a row begin or end in the tile.

Summaries are loaded in blocks of many tiles; a block that no query sees is not loaded.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.grouped_attention.kv_sources import KVSources
from pallas_kernels.grouped_attention.mosaic_tpu_blocks import KeyTile, TpuBlocks
from pallas_kernels.mosaic_tpu_common import LANES

FIELDS = 8  # rows of packed ranges: six are used, eight fill a register
FOCAL, GROUP, WINDOW = 0, 2, 4  # the row of a source's start; its end follows
MAX_QUERIES = 512  # of a tile: more would see too much of the window that each does not
MAX_PIECE = 1024  # keys of a piece of the window


@dataclasses.dataclass(frozen=True)
class GradTile:
  """Static sizes of a kernel that holds keys."""

  block_k: int  # keys of a tile
  block_q: int  # queries of a tile that meets them
  piece: int  # queries that one step loads

  @classmethod
  def for_heads(cls, tile: KeyTile, heads: int, length: int) -> "GradTile":
    """The sizes for tiles of `heads` query heads and rows of `length` queries."""
    block_q = queries_per_tile(tile.rows, heads, length)
    return cls(tile.block_k, block_q, tile.tiles * block_q)


@dataclasses.dataclass(frozen=True)
class TileSchedule:
  """Static sizes of one call."""

  heads: int  # query heads of a tile
  splits: int  # tiles of heads for one KV head
  edge_heads: int  # heads of a tile that are computed at once at the edges
  block_q: int  # queries of a tile; it has `heads` times as many rows
  block_k: int  # keys of a tile of summaries
  block: int  # keys of a block of summaries, a multiple of block_k
  window: int  # keys of a piece of the window
  group_offset: int  # index of the first group among the summaries, a multiple of block_k
  summaries: int  # keys of all blocks
  shared_bounds: bool  # whether all KV heads share the ranges
  scale2: float  # of logits in base 2
  group_bias2: float  # added to the logits of groups, in base 2
  summary_grad: GradTile
  window_grad: GradTile

  @classmethod
  def for_call(
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
  ) -> "TileSchedule":
    """The sizes for arrays of `length` queries, `focal` focal tokens and `groups` groups."""
    # As many heads of a KV head as leave LANES queries to each.
    heads = max(
      g for g in range(1, heads_per_kv + 1) if heads_per_kv % g == 0 and g * LANES <= blocks.rows
    )
    block_q = queries_per_tile(blocks.rows, heads, length)
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
    # The first key of a piece is rounded down.
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
      summary_grad=GradTile.for_heads(blocks.summary_grad, heads, length),
      window_grad=GradTile.for_heads(blocks.window_grad, heads, length),
    )

  @property
  def rows(self) -> int:
    """Rows of a tile of queries."""
    return self.heads * self.block_q

  @property
  def tiles_per_block(self) -> int:
    """Tiles of summaries in a block."""
    return self.block // self.block_k

  def scalar_bytes(self, bounds: int, length: int) -> int:
    """Scalar memory that the kernels need for `bounds` rows of ranges."""
    tiles = -(-length // self.block_q)
    key_tiles = max(
      self.summaries // self.summary_grad.block_k, -(-length // self.window_grad.block_k)
    )
    return 4 * bounds * max(_NUMBERS * tiles, 4 * key_tiles)


class Operands(NamedTuple):
  """The arrays of a call in the kernels' layout, heads before positions.

  The H query heads are P = N · splits tiles of G heads. Keys of summaries are multiplied with the
  logit scale.
  """

  query: Array  # [B, H, L, D]
  summary_key: Array  # [B, N, S, D]
  summary_value: Array
  window_key: Array  # [B, N, W, D]
  window_value: Array
  bounds: Any  # [B, n, FIELDS, L] int32, groups count from group_offset; None among gradients


def queries_per_tile(rows: int, heads: int, length: int) -> int:
  """Queries of a tile of `heads` heads and about `rows` rows: a power of two, at least LANES."""
  most = min(rows // heads, MAX_QUERIES, max(length, LANES))
  return max(1 << (most.bit_length() - 1), LANES)


def round_up(x: int, unit: int) -> int:
  """The next multiple of unit."""
  return -(-x // unit) * unit


def row_unit(dtype: Any) -> int:
  """Rows of one packed register: slices of an array begin at multiples of it."""
  return 32 // jnp.dtype(dtype).itemsize


def pad_to(x: Array, axis: int, size: int, *, mode: str = "constant") -> Array:
  """Pads an axis at its end up to `size`."""
  if x.shape[axis] >= size:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths, mode=mode)


def pack_bounds(sources: KVSources, group_offset: int, length: int) -> Array:
  """[B, n, FIELDS, length] int32; queries past the end repeat the last one's ranges."""
  shifts = (0, 0, group_offset, group_offset, 0, 0)
  ranges = [x for source in sources for x in (source.start, source.end)]
  fields = [x.astype(jnp.int32) + shift for x, shift in zip(ranges, shifts, strict=True)]
  fields += [jnp.zeros_like(fields[0])] * (FIELDS - len(fields))
  return pad_to(jnp.stack(fields, axis=2), 3, length, mode="edge")


class TileRange(NamedTuple):
  """The tiles of one source of summaries that a tile of queries visits.

  All queries see the tiles [whole_from, whole_to) whole. The tiles [first, whole_from) and
  [whole_to, edge) and the tile `edge` are masked.
  """

  first: Any
  whole_from: Any
  whole_to: Any
  edge: Any

  @classmethod
  def from_bounds(cls, first: Array, last: Array, source: int, block: int) -> "TileRange":
    """From the ranges of the first and the last query of each tile, [B, n, FIELDS, tiles]."""
    start, end = first[:, :, source], last[:, :, source + 1]
    visited = start // block
    # A tile without a visible key still reads one tile as its edge.
    edge = jnp.where(end > start, -(-end // block) - 1, visited)
    whole_from = jnp.clip(-(-last[:, :, source] // block), visited, edge)
    whole_to = jnp.clip(first[:, :, source + 1] // block, whole_from, edge)
    return cls(visited, whole_from, whole_to, edge)

  def clip(self, low: Any, high: Any) -> "TileRange":
    """The part in tiles [low, high); its `edge` is the end of the masked tiles, not visited."""
    return TileRange(*(jnp.clip(x, low, high) for x in self))


class BlockRange(NamedTuple):
  """The blocks of summaries that a tile of queries visits: first focal ones, then groups."""

  focal_from: Any
  focal_count: Any
  group_from: Any
  count: Any

  @classmethod
  def for_tiles(cls, focal: TileRange, group: TileRange, schedule: TileSchedule) -> "BlockRange":
    """The blocks that hold the tiles before the edges. No block is visited twice."""
    per = jnp.int32(schedule.tiles_per_block)
    ranges = []
    for tiles in (focal, group):
      start = lax.div(tiles.first, jnp.full_like(tiles.first, per))
      end = lax.div(tiles.edge + (per - 1), jnp.full_like(tiles.first, per))
      ranges += [start, jnp.where(tiles.edge > tiles.first, end, start)]
    focal_from, focal_to, group_from, group_to = ranges
    focal_count = focal_to - focal_from
    group_from = jnp.where(focal_count > 0, jnp.maximum(group_from, focal_to), group_from)
    count = focal_count + jnp.maximum(group_to - group_from, 0)
    return cls(focal_from, focal_count, group_from, count)

  def at(self, step: Any) -> Any:
    """The block of a step; steps after the last one repeat its block, which loads nothing."""
    step = jnp.clip(step, 0, jnp.maximum(self.count - 1, 0))
    return jnp.where(
      step < self.focal_count, self.focal_from + step, self.group_from + step - self.focal_count
    )


class KeyRanges(NamedTuple):
  """The keys that one tile of queries visits."""

  focal: TileRange
  group: TileRange
  blocks: BlockRange
  window_from: Any  # first key of the first piece of the window
  pieces: Any

  def piece(self, step: Any, schedule: TileSchedule) -> Any:
    """First key of a step's piece of the window; steps after the last one repeat its piece."""
    step = jnp.clip(step, 0, jnp.maximum(self.pieces - 1, 0))
    return self.window_from + step * schedule.window


_NUMBERS = 14  # of one `KeyRanges`


def pack_key_ranges(bounds: Array, schedule: TileSchedule, dtype: Any) -> tuple[Array, Array]:
  """[B, n, tiles * _NUMBERS]: the `KeyRanges` of all tiles of queries; and the most steps of any.

  Ranges never decrease along L, so the first and the last query of a tile determine them.
  """
  block_q = schedule.block_q
  first, last = bounds[..., ::block_q], bounds[..., block_q - 1 :: block_q]
  focal, group = (
    TileRange.from_bounds(first, last, source, schedule.block_k) for source in (FOCAL, GROUP)
  )
  unit = row_unit(dtype)
  window_from = first[:, :, WINDOW] // unit * unit
  seen = jnp.maximum(last[:, :, WINDOW + 1] - window_from, 0)
  blocks = BlockRange.for_tiles(focal, group, schedule)
  ranges = KeyRanges(focal, group, blocks, window_from, -(-seen // schedule.window))
  numbers = jnp.stack([*focal, *group, *blocks, window_from, ranges.pieces], axis=-1)
  steps = jnp.maximum(jnp.maximum(blocks.count, ranges.pieces).max(), 1)
  B, n, tiles, _ = numbers.shape
  return numbers.reshape(B, n, tiles * _NUMBERS).astype(jnp.int32), steps.astype(jnp.int32)


def unpack_key_ranges(packed: Array) -> KeyRanges:
  """The inverse of `pack_key_ranges`: arrays [B, n, tiles]."""
  numbers = packed.reshape(*packed.shape[:2], -1, _NUMBERS)
  return _key_ranges([numbers[..., i] for i in range(_NUMBERS)])


def read_key_ranges(ref: Any, schedule: TileSchedule, b: Any, p: Any, t: Any) -> KeyRanges:
  """The `KeyRanges` of tile t of head tile p of row b, from the packed ones in scalar memory."""
  n = 0 if schedule.shared_bounds else lax.div(p, jnp.int32(schedule.splits))
  return _key_ranges([ref[b, n, t * _NUMBERS + i] for i in range(_NUMBERS)])


def _key_ranges(x: list[Any]) -> KeyRanges:
  return KeyRanges(TileRange(*x[:4]), TileRange(*x[4:8]), BlockRange(*x[8:12]), x[12], x[13])


def pack_query_ranges(
  bounds: Array, source: int, first_key: int, num_keys: int, tile: GradTile
) -> Array:
  """[B, n, 4, tiles] int32: per tile of keys the `TileRange` of the query tiles that see it.

  Here the tiles [first, edge) are visited; `edge` itself is not.

  Args:
    bounds: the packed ranges of all queries.
    source: the row of `bounds` with the start of the keys' source.
    first_key: index of the first key in the terms of `bounds`.
    num_keys: how many keys there are.
    tile: sizes of the tiles.
  """
  start, end = bounds[:, :, source], bounds[:, :, source + 1]
  begins_E = first_key + jnp.arange(0, num_keys, tile.block_k, dtype=jnp.int32)

  def count(seen_BxnxExT: Array) -> Array:
    return seen_BxnxExT.sum(axis=-1, dtype=jnp.int32)

  # Ranges never decrease along L: tiles with a property are counted instead of searched.
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
