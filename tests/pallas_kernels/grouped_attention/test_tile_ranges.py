"""Spans of tiles and their division into chunks."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_attention.tile_ranges import (
  chunk_of_span,
  dealt_tile,
  loop_span,
  num_dealt_tiles,
  Span,
)


def _tiles(span: Span, block: int) -> list[tuple[int, bool]]:
  """The first entry of every tile of a span, and whether the tile needs a mask."""
  size = int(span.last) // block + 2

  def body(first, masked, seen):
    return seen.at[first // block].set(1 + masked)

  seen = np.asarray(loop_span(span, block, body, jnp.zeros(size, jnp.int32)))
  return [(int(i), bool(seen[i] == 2)) for i in np.flatnonzero(seen)]


@pytest.mark.parametrize("chunks", [1, 2, 3, 16])
@pytest.mark.parametrize(
  "bounds",
  [(0, 10, 60, 64), (16, 30, 20, 40), (8, 8, 72, 100), (24, 24, 24, 24), (0, 0, 96, 96)],
  ids=["edges", "no_full_tile", "ragged", "empty", "all_full"],
)
def test_chunks_visit_every_tile_of_a_span_once(bounds: tuple[int, ...], chunks: int):
  block = 8
  span = Span(*(jnp.int32(x) for x in bounds))
  parts = [
    _tiles(chunk_of_span(span, jnp.int32(chunk), chunks, block), block) for chunk in range(chunks)
  ]
  assert [tile for part in parts for tile in part] == _tiles(span, block)
  sizes = [len(part) for part in parts]
  assert sizes == sorted(sizes, reverse=True)
  assert max(sizes) == -(-sum(sizes) // chunks)


@pytest.mark.parametrize(
  ("total", "programs"), [(1, 1), (7, 3), (9, 3), (10, 3), (528, 132), (700, 132)]
)
def test_every_tile_of_work_is_dealt_once_and_work_is_even(total: int, programs: int):
  hands = []
  for program in range(programs):
    turns = int(num_dealt_tiles(total, jnp.int32(program), programs))
    hands.append(
      [int(dealt_tile(jnp.int32(t), jnp.int32(program), programs)) for t in range(turns)]
    )
  assert sorted(tile for hand in hands for tile in hand) == list(range(total))
  costs = [sum(total - tile for tile in hand) for hand in hands]  # falling linearly
  assert max(costs) - min(costs) <= total
