"""The mask of grouped attention: three ranges per query instead of an L×L array."""

from typing import NamedTuple

from jaxtyping import Array, Int


class Bounds(NamedTuple):
  """What each query sees: entries [start, end) of each of the three key sources.

  n is the number of KV heads, or 1 where all heads see the same. Every field is non-decreasing
  along L, so that a tile of queries needs one contiguous piece of each source. A query whose
  three ranges are empty (padding) gets zeros.
  """

  focal_start: Int[Array, "B n L"]
  focal_end: Int[Array, "B n L"]
  group_start: Int[Array, "B n L"]
  group_end: Int[Array, "B n L"]
  window_start: Int[Array, "B n L"]
  window_end: Int[Array, "B n L"]
