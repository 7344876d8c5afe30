"""A range of adjacent heads inside the arrays of all heads."""

from typing import NamedTuple

from jax import Array


class HeadRange(NamedTuple):
  """Adjacent KV heads: `size` heads from head `first` on. Static."""

  first: int
  size: int

  def of(self, x: Array, num_kv_heads: int) -> Array:
    """These heads of an array [..., heads, D], or the query heads that belong to them.

    Args:
      x: KV heads, or a multiple of them, on the last axis but one.
      num_kv_heads: N.
    """
    ratio = x.shape[-2] // num_kv_heads
    return x[..., self.first * ratio : (self.first + self.size) * ratio, :]


def all_heads(key: Array) -> HeadRange:
  """The range of all KV heads of [B, L, N, D]."""
  return HeadRange(0, key.shape[2])
