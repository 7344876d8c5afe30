"""The number of chunks of queries balances the programs of the dk/dv kernel."""

import numpy as np
import pytest

from pallas_kernels.grouped_attention.query_chunks import query_chunks
from pallas_kernels.grouped_attention.tile_ranges import dealt_tile, num_dealt_tiles


# (key tiles, KV heads, steps, programs) and the chunks that were fastest on an H200.
@pytest.mark.parametrize(("sizes", "chunks"), [((11, 8, 512, 132), 3), ((43, 8, 2048, 132), 3)])
def test_measured_cases(sizes: tuple[int, ...], chunks: int):
  assert query_chunks(*sizes) == chunks


def test_enough_tiles_need_no_chunks():
  assert query_chunks(4000, 8, 512, 132) == 1


def test_short_sequences_have_one_chunk():
  assert query_chunks(1, 1, 8, 132) == 1


def test_no_other_number_of_chunks_has_a_shorter_longest_program():
  key_tiles, heads, steps, programs = 5, 3, 256, 16

  def longest(chunks: int) -> float:
    work = [
      np.ceil(steps * (1 - tile / key_tiles) / chunks) + 8
      for tile in range(key_tiles)
      for _ in range(heads * chunks)
    ]
    total = np.zeros(programs)
    for program in range(programs):
      for turn in range(int(num_dealt_tiles(len(work), program, programs))):
        total[program] += work[int(dealt_tile(turn, program, programs))]
    return total.max()

  chosen = longest(query_chunks(key_tiles, heads, steps, programs))
  assert chosen == min(longest(chunks) for chunks in range(1, 17))
