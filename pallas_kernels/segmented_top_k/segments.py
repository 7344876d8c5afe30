"""The segments of a row that scores are selected from."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool

from pallas_kernels.masks import in_range


class Segments(NamedTuple):
  """C disjoint segments of each row, in order: int32 arrays [B, C].

  A segment of length 0 may start anywhere.
  """

  start: Any  # first position
  length: Any
  quota: Any  # how many scores to select; a quota beyond the length selects all

  def inside(self, row_length: int) -> Bool[Array, "B C L"]:
    """Whether each position of a row is in each segment."""
    return in_range(row_length, jnp.asarray(self.start), jnp.asarray(self.start + self.length))
