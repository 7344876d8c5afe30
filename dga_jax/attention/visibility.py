"""What each query sees: one range of each key/value source instead of an L×L mask."""

from typing import NamedTuple

from jaxtyping import Array, Int32

from pallas_kernels.group_merge import Entries
from pallas_kernels.grouped_attention import KVSource, KVSources


class Visibility(NamedTuple):
  """The range [start, end) that each query sees of the focal tokens, the groups and the window.

  n is the number of KV heads, or 1 where all heads see the same. Every field is non-decreasing
  along L. A query whose three ranges are empty (padding) attends to nothing.
  """

  focal_start: Int32[Array, "B n L"]
  focal_end: Int32[Array, "B n L"]
  group_start: Int32[Array, "B n L"]
  group_end: Int32[Array, "B n L"]
  window_start: Int32[Array, "B n L"]
  window_end: Int32[Array, "B n L"]

  def sources(self, entries: Entries) -> KVSources:
    """The sources of `grouped_attention`: these ranges of the given keys and values."""
    return KVSources(
      focal=KVSource(entries.focal_key, entries.focal_value, self.focal_start, self.focal_end),
      group=KVSource(entries.group_key, entries.group_value, self.group_start, self.group_end),
      window=KVSource(entries.window_key, entries.window_value, self.window_start, self.window_end),
    )
