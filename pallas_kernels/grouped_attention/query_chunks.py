"""How many chunks of queries the dk/dv kernel of the focal tokens and groups works on.

These sources have few keys, so their key tiles alone occupy few programs. With c chunks of queries,
each key tile is c tiles of work, whose partial sums XLA adds. Few chunks cost balance, many cost
time for each tile of work and memory traffic for its partial sums.
"""

import functools

import numpy as np

# Time of a tile of work beside its steps, in steps: loading keys and values, and writing and adding
# the partial sums. Measured on an H200 at 8K.
_STEPS_OF_TILE = 8
_LEAST_STEPS = 16  # of a tile of work, if every query sees its keys
_MOST_CHUNKS = 32


@functools.cache
def query_chunks(key_tiles: int, heads: int, steps: int, programs: int) -> int:
  """The number of chunks for which the program with the most work has the least.

  Assumes causal attention: the first key tile is seen by all queries, and later ones by fewer and
  fewer, down to none.

  Args:
    key_tiles: of one KV head.
    heads: batch entries times KV heads.
    steps: query tiles that meet a key tile which every query sees, over all query heads.
    programs: that share the work, by `tile_ranges.dealt_tile`.
  """
  seen_T = steps * (1 - np.arange(key_tiles) / key_tiles)
  candidates = range(1, max(1, min(_MOST_CHUNKS, steps // _LEAST_STEPS)) + 1)
  return min(candidates, key=lambda chunks: _longest(seen_T, heads, chunks, programs))


def _longest(seen_T: np.ndarray, heads: int, chunks: int, programs: int) -> float:
  """Steps of the program with the most work."""
  work = np.repeat(np.ceil(seen_T / chunks) + _STEPS_OF_TILE, heads * chunks)
  turns = np.pad(work, (0, -len(work) % programs)).reshape(-1, programs)
  turns[1::2] = turns[1::2, ::-1].copy()
  return float(turns.sum(axis=0).max())
