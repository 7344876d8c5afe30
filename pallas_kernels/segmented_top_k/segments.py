"""Which parts of a row are selected from, and how much of each."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool

from pallas_kernels.grouped_attention.reference import in_range


class Ranges(NamedTuple):
  """C disjoint ranges of each row, in order, int32 [B, C]. Those of length 0 may lie anywhere."""

  start: Any  # first position
  length: Any
  quota: Any  # how many to select; a quota beyond the length selects all

  def inside(self, row_length: int) -> Bool[Array, "B C L"]:
    """Whether each position of a row lies in each range."""
    return in_range(row_length, jnp.asarray(self.start), self.start + self.length)
