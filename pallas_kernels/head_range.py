"""A range of adjacent heads inside the arrays of all heads."""

from typing import NamedTuple


class HeadRange(NamedTuple):
  """Adjacent KV heads: `size` heads from head `first` on. Static."""

  first: int
  size: int
