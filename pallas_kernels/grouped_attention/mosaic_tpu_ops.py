"""Inside the TPU kernels: block specs of the query-side kernels, loops over tiles, masks."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.grouped_attention.mosaic_tpu_schedule import (
  FIELDS,
  FOCAL,
  GROUP,
  KeyRanges,
  Operands,
  read_key_ranges,
  row_unit,
  TileSchedule,
  WINDOW,
)
from pallas_kernels.mosaic_tpu_common import LANES, SUBLANES


class KVTile(NamedTuple):
  """A tile of keys and values: references in a kernel, or block specs."""

  key: Any
  value: Any


class KVTiles(NamedTuple):
  """The keys and values that a step of a query-side kernel reads."""

  block: KVTile  # the step's block of summaries
  focal_edge: KVTile  # the last tile of focal tokens that the queries see
  group_edge: KVTile  # the last tile of groups that they see
  window: KVTile  # the step's piece of the window

  def edges(self, scale2: float) -> tuple[Array, Array]:
    """Keys and values of both edges and of the window, as the first step reads them."""
    window = scaled(self.window.key[...], scale2)
    keys = jnp.concatenate([self.focal_edge.key[...], self.group_edge.key[...], window], axis=0)
    tiles = (self.focal_edge, self.group_edge, self.window)
    return keys, jnp.concatenate([tile.value[...] for tile in tiles], axis=0)


def kv_operands(operands: Operands) -> KVTiles:
  """The arrays of which a kernel with the specs `QueryGrid.kv` reads tiles."""
  summaries = KVTile(operands.summary_key, operands.summary_value)
  window = KVTile(operands.window_key, operands.window_value)
  return KVTiles(summaries, summaries, summaries, window)


@dataclasses.dataclass(frozen=True)
class QueryGrid:
  """Block specs of kernels on a grid of (row, head tile, tile of queries, step)."""

  schedule: TileSchedule
  head_dim: int
  window_size: int
  unit: int

  @classmethod
  def for_operands(cls, operands: Operands, schedule: TileSchedule) -> "QueryGrid":
    """The grid of a call."""
    _, _, window_size, head_dim = operands.window_key.shape
    return cls(schedule, head_dim, window_size, row_unit(operands.query.dtype))

  def query(self) -> pl.BlockSpec:
    """A tile of [B, H, L, D]."""
    shape = (None, self.schedule.heads, self.schedule.block_q, self.head_dim)
    return pl.BlockSpec(shape, lambda b, p, t, j, _: (b, p, t, 0))

  def row(self) -> pl.BlockSpec:
    """A tile of [B, P, G, L]."""
    shape = (None, None, self.schedule.heads, self.schedule.block_q)
    return pl.BlockSpec(shape, lambda b, p, t, j, _: (b, p, 0, t))

  def bounds(self) -> pl.BlockSpec:
    """A tile of the packed ranges."""
    return pl.BlockSpec(
      (None, None, FIELDS, self.schedule.block_q),
      lambda b, p, t, j, _: (b, 0 if self.schedule.shared_bounds else self._kv_head(p), 0, t),
    )

  def kv(self) -> KVTiles:
    """The keys and values that a step reads of `kv_operands`."""
    block = self._summaries(self.schedule.block, lambda ranges, j: ranges.blocks.at(j))
    focal = self._summaries(self.schedule.block_k, lambda ranges, j: ranges.focal.edge)
    group = self._summaries(self.schedule.block_k, lambda ranges, j: ranges.group.edge)
    shape = (
      pl.squeezed,
      pl.squeezed,
      pl.Element(self.schedule.window),
      pl.Element(self.head_dim),
    )
    window = pl.BlockSpec(shape, self._window_at)
    return KVTiles(*(KVTile(x, x) for x in (block, focal, group, window)))

  def _kv_head(self, p: Any) -> Any:
    return lax.div(p, jnp.int32(self.schedule.splits))

  def _summaries(self, size: int, at: Callable[[KeyRanges, Any], Any]) -> pl.BlockSpec:
    def index(b: Any, p: Any, t: Any, j: Any, ref: Any) -> Any:
      return b, self._kv_head(p), at(read_key_ranges(ref, self.schedule, b, p, t), j), 0

    return pl.BlockSpec((None, None, size, self.head_dim), index)

  def _window_at(self, b: Any, p: Any, t: Any, j: Any, ref: Any) -> Any:
    nominal = read_key_ranges(ref, self.schedule, b, p, t).piece(j, self.schedule)
    return b, self._kv_head(p), pl.multiple_of(self.loaded_from(nominal), self.unit), 0

  def loaded_from(self, nominal: Any) -> Any:
    """The first key that is loaded for a piece: clamped so that the piece stays in the array."""
    return jnp.minimum(nominal, self.window_size - self.schedule.window)


def loop_ranges(ranges: list[tuple[Any, Any]], body: Callable[[Any], None]) -> None:
  """Calls body(i) for all i of some ranges [from, to), in one loop."""
  counts = [jnp.maximum(to - start, 0) for start, to in ranges]

  def one(i: Any, _: None) -> None:
    tile, before = ranges[0][0] + i, counts[0]
    for (start, _), count in zip(ranges[1:], counts[1:], strict=True):
      tile = jnp.where(i >= before, start + i - before, tile)
      before = before + count
    body(tile)

  lax.fori_loop(0, sum(counts[1:], counts[0]), one, None)


def summary_tiles(
  ranges: KeyRanges, schedule: TileSchedule, step: Any, body: Callable[[Any, Any, bool], None]
) -> None:
  """Calls body(tile, first row in the block, masked) for a step's block, except the edges."""

  @pl.when(step < ranges.blocks.count)
  def _() -> None:
    low = ranges.blocks.at(step) * schedule.tiles_per_block
    focal, group = (
      tiles.clip(low, low + schedule.tiles_per_block) for tiles in (ranges.focal, ranges.group)
    )

    def call(tile: Any, *, masked: bool) -> None:
      body(tile, pl.multiple_of((tile - low) * schedule.block_k, schedule.block_k), masked)

    whole = [(tiles.whole_from, tiles.whole_to) for tiles in (focal, group)]
    rest = [(tiles.first, tiles.whole_from) for tiles in (focal, group)]
    rest += [(tiles.whole_to, tiles.edge) for tiles in (focal, group)]
    loop_ranges(whole, lambda tile: call(tile, masked=False))
    loop_ranges(rest, lambda tile: call(tile, masked=True))


def cap(first: Any, width: int, start: Array, end: Array) -> Array:
  """[queries, width] float32 caps for keys from `first` on: +∞ if a query sees a key, else −∞.

  The minimum of logits and caps masks the logits.
  """
  key = first + lax.broadcasted_iota(jnp.int32, (1, width), 1)
  return jnp.where((start <= key) & (key < end), jnp.inf, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class EdgeMasks:
  """Masks of one tile of queries, as caps on logits."""

  schedule: TileSchedule
  columns: Array  # [queries, FIELDS]

  def _range(self, source: int) -> tuple[Array, Array]:
    return self.columns[:, source : source + 1], self.columns[:, source + 1 : source + 2]

  def edges(self, ranges: KeyRanges, piece_from: Any) -> Array:
    """Caps of the focal edge, the group edge and the first piece of the window, side by side."""
    block = self.schedule.block_k
    parts = [
      cap(ranges.focal.edge * block, block, *self._range(FOCAL)),
      cap(ranges.group.edge * block, block, *self._range(GROUP)),
      cap(piece_from, self.schedule.window, *self._range(WINDOW)),
    ]
    return jnp.concatenate(parts, axis=1)

  def summary(self, tile: Any) -> Array:
    """Caps of a tile of summaries."""
    is_group = self._is_group(tile)
    start, end = (
      jnp.where(is_group, group, focal)
      for focal, group in zip(self._range(FOCAL), self._range(GROUP), strict=True)
    )
    return cap(tile * self.schedule.block_k, self.schedule.block_k, start, end)

  def bias(self, tile: Any) -> Array | None:
    """Bias of the logits of a tile of summaries; None for no bias at all."""
    if not self.schedule.group_bias2:
      return None
    return jnp.where(self._is_group(tile), self.schedule.group_bias2, 0.0)

  def edge_bias(self) -> Array | None:
    """[1, keys] bias of the logits of the edges, side by side as in `edges`."""
    if not self.schedule.group_bias2:
      return None
    block = self.schedule.block_k
    key = lax.broadcasted_iota(jnp.int32, (1, 2 * block + self.schedule.window), 1)
    is_group = (key >= block) & (key < 2 * block)
    return jnp.where(is_group, self.schedule.group_bias2, 0.0)

  def _is_group(self, tile: Any) -> Any:
    return tile * self.schedule.block_k >= self.schedule.group_offset

  def further_piece(self, nominal: Any, loaded_from: Any) -> Array:
    """Caps of a later piece of the window; earlier pieces hold the keys before `nominal`."""
    start, end = self._range(WINDOW)
    return cap(loaded_from, self.schedule.window, jnp.maximum(start, nominal), end)


def scaled(key: Array, scale: float) -> Array:
  """Keys times the scale of logits: fewer numbers than the logits."""
  return (key.astype(jnp.float32) * scale).astype(key.dtype)


def capped(logits: Array, cap_QxK: Array) -> Array:
  """Logits of stacked heads, masked by the caps of their queries."""
  shape = (-1, *cap_QxK.shape)
  return jnp.minimum(logits.reshape(shape), cap_QxK[None]).reshape(logits.shape)


def columns_of(rows: Array) -> Array:
  """[queries, rows] from [rows, queries]."""
  short = -rows.shape[0] % SUBLANES
  if short:
    rows = jnp.concatenate([rows, jnp.zeros((short, rows.shape[1]), rows.dtype)], axis=0)
  return rows.T


def stack_columns(rows_GxQ: Array) -> Array:
  """[heads * queries, LANES] with equal lanes, from one number for each head and query."""
  columns = columns_of(rows_GxQ)
  stacked = jnp.concatenate([columns[:, g : g + 1] for g in range(rows_GxQ.shape[0])], axis=0)
  return jnp.broadcast_to(stacked, (stacked.shape[0], LANES))


def spread(x: Array, width: int) -> Array:
  """[rows, width] from [rows, LANES] with equal lanes."""
  return x[:, :width] if width < LANES else jnp.tile(x, (1, width // LANES))


def lane_sum(x: Array) -> Array:
  """[rows, LANES]: the sum over registers, lane by lane."""
  total = x[:, :LANES]
  for i in range(1, x.shape[1] // LANES):
    total += x[:, i * LANES : (i + 1) * LANES]
  return total
