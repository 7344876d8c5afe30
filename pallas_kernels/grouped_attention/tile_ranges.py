"""Key sources, and which tiles of queries and entries meet. Shared by the GPU kernels.

Letters: B batch, L queries, H query heads, N key/value heads, D head dim, S entries of one
key source (focal, groups or window), n key/value heads of the bounds (N or 1).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.grouped_attention.kv_sources import KVSources

LOG2_E = math.log2(math.e)

# Where a running maximum starts: finite, so that a row which sees nothing gets exp2(-inf - m) = 0
# and a correction of exp2(0) = 1 instead of the NaN of (-inf) - (-inf).
MASK_VALUE = -1e30


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
) -> T:
  """Runs `body(first, masked, carry)` over [span.first, span.last) in steps of `block`.

  Tiles that every row sees whole run in a loop of their own, without a mask.
  `has_full_tiles=False` leaves that loop out, for sources too narrow to hold such a tile.
  """
  num_tiles = lax.div(jnp.maximum(span.last - span.first, 0) + (block - 1), block)
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

  carry = lax.fori_loop(0, num_full, full, carry)
  return lax.fori_loop(0, num_tiles - num_full, straddling, carry)


# Tiles begin at multiples of it: the TMA unit copies rows in units of 8.
ROW_UNIT = 8


def tile_ranges(sources: KVSources, block: int) -> Array:
  """[B, n, tiles, 12] int32: per tile of `block` queries its `Span` of each source.

  Bounds never decrease along a tile, so its first and last query tell everything.
  """
  first, last = slice(0, None, block), slice(block - 1, None, block)
  numbers = []
  for s in sources:
    numbers += [s.start[..., first] // ROW_UNIT * ROW_UNIT, s.start[..., last]]
    numbers += [s.end[..., first], s.end[..., last]]
  return jnp.stack(numbers, axis=-1)


def query_spans(start_BxnxL: Array, end_BxnxL: Array, num_entries: int, block: int) -> Array:
  """[B, n, tiles, 4] int32: per tile of `block` entries the `Span` of the queries that see it.

  Bounds never decrease along L, so each number is one binary search.
  """
  first_T = jnp.arange(0, num_entries, block, dtype=jnp.int32)
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
