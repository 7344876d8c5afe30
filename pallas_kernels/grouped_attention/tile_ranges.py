"""Which tiles of queries and of keys meet, for the GPU kernels: ranges, and loops over them.

Letters: B batch, L queries, H query heads, N KV heads, D head dim, S tokens of one source, n KV
heads of the ranges (N or 1), T tiles.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.grouped_attention.kv_sources import KVSource, KVSources


class Span(NamedTuple):
  """The range [first, last) that a tile touches; every row sees all of [full_first, full_last)."""

  first: Array
  full_first: Array
  full_last: Array
  last: Array


def loop_span[T](
  span: Span,
  block: int,
  body: Callable[[Array, bool, T], T],
  carry: T,
  *,
  has_full_tiles: bool = True,
  full_tiles: Callable[[Array, T], T] | None = None,
  half_tile: Callable[[Array, bool, T], T] | None = None,
) -> T:
  """Runs `body(first, masked, carry)` over [span.first, span.last) in steps of `block`.

  Tiles that every row sees whole run in a loop of their own, without a mask, or in
  `full_tiles(count, carry)`, which needs no positions.
  `has_full_tiles=False` omits that loop, for sources too narrow to hold such a tile.
  With `half_tile`, it takes the last tile if that has block / 2 entries or fewer.
  """
  size = jnp.maximum(span.last - span.first, 0)
  num_tiles = lax.div(size + (block - 1), block)
  if half_tile is not None:
    rest = size - lax.div(size, block) * block
    num_halves = ((rest > 0) & (rest <= block // 2)).astype(jnp.int32)
    num_tiles -= num_halves
  if not has_full_tiles:
    return lax.fori_loop(0, num_tiles, lambda t, c: body(span.first + t * block, True, c), carry)
  before = lax.div(jnp.maximum(span.full_first - span.first, 0) + (block - 1), block)
  whole = lax.div(jnp.maximum(span.full_last - span.first, 0), block)
  num_full = jnp.maximum(whole - before, 0)

  def full(t: Array, carry: T) -> T:
    return body(span.first + (before + t) * block, False, carry)

  def straddling(t: Array, carry: T) -> T:
    tile = jnp.where(t < before, t, t + num_full)
    return body(span.first + tile * block, True, carry)

  if full_tiles is None:
    carry = lax.fori_loop(0, num_full, full, carry)
  else:
    carry = full_tiles(num_full, carry)
  carry = lax.fori_loop(0, num_tiles - num_full, straddling, carry)
  if half_tile is None:
    return carry
  last = span.first + num_tiles * block
  return lax.fori_loop(0, num_halves, lambda _, c: half_tile(last, True, c), carry)


def chunk_of_span(span: Span, chunk: Array, chunks: int, block: int) -> Span:
  """The part of a span that is chunk number `chunk` of `chunks` equal runs of its tiles.

  The runs are in order, and the last ones are shorter or empty.
  """
  num_tiles = lax.div(jnp.maximum(span.last - span.first, 0) + (block - 1), jnp.int32(block))
  rows = lax.div(num_tiles + (chunks - 1), jnp.int32(chunks)) * block
  first = span.first + chunk * rows
  last = jnp.minimum(span.last, first + rows)
  return Span(first, span.full_first, jnp.minimum(span.full_last, last), last)


def dealt_tile(turn: Array, program: Array, programs: int) -> Array:
  """The tile of work that a program takes in a turn.

  Tiles are numbered in the order of falling cost. Programs take one tile each in a turn, in
  ascending and descending order alternately, so that all get nearly the same work.
  """
  is_even = lax.rem(turn, jnp.int32(2)) == 0
  return turn * programs + jnp.where(is_even, program, programs - 1 - program)


def num_dealt_tiles(total: int, program: Array, programs: int) -> Array:
  """How many of `total` tiles of work a program takes."""
  turns = jnp.int32(total // programs)
  return turns + (dealt_tile(turns, program, programs) < total).astype(jnp.int32)


# The TMA unit copies rows in units of 8: tiles begin at multiples of it.
ROW_UNIT = 8


def tile_ranges(sources: KVSources, block: int, visited: int) -> Array:
  """[B, n, T, 12] int32: the `Span` of each source that each tile of `block` queries sees.

  Ranges never decrease along L, so the first and the last query of a tile determine its span. Tiles
  that see no key at all visit one key tile, in which all entries are masked. Without a key tile the
  forward kernel for Hopper would deadlock: one worker waits in its last tile of work for a turn of
  the other one, which waits for queries in the slot that the first worker occupies.

  Args:
    sources: with keys in a multiple of ROW_UNIT, ROW_UNIT or more.
    block: queries of a tile; L is a multiple of it.
    visited: index of a source that the kernel visits.
  """
  at_first, at_last = slice(0, None, block), slice(block - 1, None, block)
  spans = [
    Span(
      s.start[..., at_first] // ROW_UNIT * ROW_UNIT,
      s.start[..., at_last],
      s.end[..., at_first],
      s.end[..., at_last],
    )
    for s in sources
  ]
  is_empty = functools.reduce(jnp.logical_and, [span.last <= span.first for span in spans])
  span = spans[visited]
  first = jnp.minimum(span.first, sources[visited].key.shape[1] - ROW_UNIT)
  spans[visited] = span._replace(
    first=jnp.where(is_empty, first, span.first), last=jnp.where(is_empty, first + 1, span.last)
  )
  return jnp.stack([number for span in spans for number in span], axis=-1)


def query_spans(start_BxnxL: Array, end_BxnxL: Array, num_keys: int, block: int) -> Array:
  """[B, n, T, 4] int32: the `Span` of the queries that see each tile of `block` keys.

  Ranges never decrease along L, so each number is one binary search.
  """
  first_T = jnp.arange(0, num_keys, block, dtype=jnp.int32)
  last_T = first_T + block

  def search(start_L: Array, end_L: Array) -> Array:
    def count(bound_L: Array, value_T: Array, side: str) -> Array:
      # Unrolled, the search is one fused kernel instead of a loop of small ones.
      return jnp.searchsorted(bound_L, value_T, side=side, method="scan_unrolled")

    first = count(end_L, first_T, "right")  # the first query whose end is past first
    full_first = count(end_L, last_T, "left")  # ... whose end is at or past last
    full_last = count(start_L, first_T, "right")  # ... whose start is past first
    last = count(start_L, last_T, "left")  # ... whose start is at or past last
    first = first // ROW_UNIT * ROW_UNIT
    return jnp.stack([first, full_first, full_last, last], axis=-1).astype(jnp.int32)

  return jax.vmap(jax.vmap(search))(start_BxnxL, end_BxnxL)


def sum_heads(partial_BxSxPxD: Array, source: KVSource) -> Array:
  """[B, S, N, D] in the source's dtype from sums over parts of a KV head's query heads.

  Args:
    partial_BxSxPxD: P = N · parts sums, of S tokens or more (padding).
    source: gives S, N and the dtype.
  """
  B, S, N, D = source.key.shape
  partial_BxSxPxD = partial_BxSxPxD[:, :S]
  if partial_BxSxPxD.shape[2] == N:
    return partial_BxSxPxD.astype(source.key.dtype)
  return partial_BxSxPxD.reshape(B, S, N, -1, D).sum(axis=3).astype(source.key.dtype)
