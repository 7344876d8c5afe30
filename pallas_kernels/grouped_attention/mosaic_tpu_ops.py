"""Inside the TPU kernels: block specs of query-side kernels, loops over tiles, masks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.grouped_attention.mosaic_tpu_schedule import (
  FIELDS,
  FOCAL,
  GROUP,
  Operands,
  read_visits,
  row_unit,
  Visits,
  Walk,
  WINDOW,
)
from pallas_kernels.mosaic_tpu_common import LANES, SUBLANES


@dataclasses.dataclass(frozen=True)
class QueryGrid:
  """Block specs of kernels on a grid of (row, head tile, tile of queries, step)."""

  walk: Walk
  head_dim: int
  window_size: int
  unit: int

  @classmethod
  def of(cls, operands: Operands, walk: Walk) -> "QueryGrid":
    """For the arrays of a call."""
    _, _, window_size, head_dim = operands.window_key.shape
    return cls(walk, head_dim, window_size, row_unit(operands.query.dtype))

  def query(self) -> pl.BlockSpec:
    """A tile of [B, P, G, L, D]."""
    shape = (None, None, self.walk.heads, self.walk.block_q, self.head_dim)
    return pl.BlockSpec(shape, lambda b, p, t, j, _: (b, p, 0, t, 0))

  def row(self) -> pl.BlockSpec:
    """A tile of [B, P, G, L]."""
    shape = (None, None, self.walk.heads, self.walk.block_q)
    return pl.BlockSpec(shape, lambda b, p, t, j, _: (b, p, 0, t))

  def bounds(self) -> pl.BlockSpec:
    """A tile of the packed bounds."""
    return pl.BlockSpec(
      (None, None, FIELDS, self.walk.block_q),
      lambda b, p, t, j, _: (b, 0 if self.walk.shared_bounds else self._kv_head(p), 0, t),
    )

  def entries(self) -> list[pl.BlockSpec]:
    """Of summaries a step's block, a tile's focal edge and group edge; of the window a piece."""
    block = self._summaries(self.walk.block, lambda visits, j: visits.blocks.at(j))
    focal = self._summaries(self.walk.block_k, lambda visits, j: visits.focal.edge)
    group = self._summaries(self.walk.block_k, lambda visits, j: visits.group.edge)
    piece = pl.BlockSpec(
      (pl.squeezed, pl.squeezed, pl.Element(self.walk.window), pl.Element(self.head_dim)),
      self._piece_at,
    )
    return [x for x in (block, focal, group, piece) for _ in ("key", "value")]

  def _kv_head(self, p: Any) -> Any:
    return lax.div(p, jnp.int32(self.walk.splits))

  def _summaries(self, size: int, at: Callable[[Visits, Any], Any]) -> pl.BlockSpec:
    def index(b: Any, p: Any, t: Any, j: Any, ref: Any) -> Any:
      return b, self._kv_head(p), at(read_visits(ref, self.walk, b, p, t), j), 0

    return pl.BlockSpec((None, None, size, self.head_dim), index)

  def _piece_at(self, b: Any, p: Any, t: Any, j: Any, ref: Any) -> Any:
    nominal = read_visits(ref, self.walk, b, p, t).piece(j, self.walk)
    return b, self._kv_head(p), pl.multiple_of(self.loaded_from(nominal), self.unit), 0

  def loaded_from(self, nominal: Any) -> Any:
    """The first entry that is loaded for a piece: its own, or what leaves it inside the array."""
    return jnp.minimum(nominal, self.window_size - self.walk.window)


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
  visits: Visits, walk: Walk, step: Any, body: Callable[[Any, Any, bool], None]
) -> None:
  """Calls body(tile, first row in the block, masked) for a step's block, but for the edges."""

  @pl.when(step < visits.blocks.count)
  def _() -> None:
    low = visits.blocks.at(step) * walk.tiles_per_block
    focal, group = (run.inside(low, low + walk.tiles_per_block) for run in visits[:2])

    def call(tile: Any, *, masked: bool) -> None:
      body(tile, pl.multiple_of((tile - low) * walk.block_k, walk.block_k), masked)

    whole = [(run.whole_from, run.whole_to) for run in (focal, group)]
    rest = [(run.first, run.whole_from) for run in (focal, group)]
    rest += [(run.whole_to, run.edge) for run in (focal, group)]
    loop_ranges(whole, lambda tile: call(tile, masked=False))
    loop_ranges(rest, lambda tile: call(tile, masked=True))


def cap(first: Any, width: int, start: Array, end: Array) -> Array:
  """[queries, width]: infinite where a query sees an entry, from `first` on; else minus infinity.

  The minimum with it masks logits.
  """
  entry = first + lax.broadcasted_iota(jnp.int32, (1, width), 1)
  return jnp.where((start <= entry) & (entry < end), jnp.inf, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class EdgeMasks:
  """Masks of one tile of queries, as caps on logits."""

  walk: Walk
  columns: Array  # [queries, FIELDS]

  def _range(self, source: int) -> tuple[Array, Array]:
    return self.columns[:, source : source + 1], self.columns[:, source + 1 : source + 2]

  def edges(self, visits: Visits, piece_from: Any) -> Array:
    """Of the focal edge, the group edge and the first piece of the window, side by side."""
    block = self.walk.block_k
    parts = [
      cap(visits.focal.edge * block, block, *self._range(FOCAL)),
      cap(visits.group.edge * block, block, *self._range(GROUP)),
      cap(piece_from, self.walk.window, *self._range(WINDOW)),
    ]
    return jnp.concatenate(parts, axis=1)

  def summary(self, tile: Any) -> Array:
    """Of a tile of summaries."""
    is_group = self._is_group(tile)
    start, end = (
      jnp.where(is_group, group, focal)
      for focal, group in zip(self._range(FOCAL), self._range(GROUP), strict=True)
    )
    return cap(tile * self.walk.block_k, self.walk.block_k, start, end)

  def bias(self, tile: Any) -> Array | None:
    """Of the logits of a tile of summaries."""
    if not self.walk.group_bias2:
      return None
    return jnp.where(self._is_group(tile), self.walk.group_bias2, 0.0)

  def edge_bias(self) -> Array | None:
    """[1, entries] of the logits of the edges, side by side as in `edges`."""
    if not self.walk.group_bias2:
      return None
    block = self.walk.block_k
    entry = lax.broadcasted_iota(jnp.int32, (1, 2 * block + self.walk.window), 1)
    is_group = (entry >= block) & (entry < 2 * block)
    return jnp.where(is_group, self.walk.group_bias2, 0.0)

  def _is_group(self, tile: Any) -> Any:
    return tile * self.walk.block_k >= self.walk.group_offset

  def further_piece(self, nominal: Any, loaded_from: Any) -> Array:
    """Of a later piece of the window: entries before it have been seen to."""
    start, end = self._range(WINDOW)
    return cap(loaded_from, self.walk.window, jnp.maximum(start, nominal), end)


def scaled(key: Array, scale: float) -> Array:
  """Keys times the scale of logits: far fewer numbers than the logits."""
  return (key.astype(jnp.float32) * scale).astype(key.dtype)


def capped(logits: Array, cap_QxK: Array) -> Array:
  """Logits of stacked heads under a mask of their queries."""
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
  """[rows, LANES] with equal lanes, made `width` wide."""
  return x[:, :width] if width < LANES else jnp.tile(x, (1, width // LANES))


def lane_sum(x: Array) -> Array:
  """[rows, LANES]: the sum over registers, lane by lane."""
  total = x[:, :LANES]
  for i in range(1, x.shape[1] // LANES):
    total += x[:, i * LANES : (i + 1) * LANES]
  return total
