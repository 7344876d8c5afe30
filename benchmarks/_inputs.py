"""Random inputs of the attention benchmarks."""

import dataclasses

import jax
from jax import Array

from dga_jax import DGAConfig
from dga_jax.attention.aggregate import plan_and_merge
from pallas_kernels.grouped_attention import Bounds


@dataclasses.dataclass(frozen=True)
class Shape:
  """One row of a table: batch 1, L queries, H query heads, N KV heads, head dim D."""

  L: int
  H: int
  N: int
  D: int
  dtype: str = "bfloat16"

  def tokens(self, key: Array) -> tuple[Array, Array, Array]:
    """Query, key and value."""
    keys = jax.random.split(key, 3)
    heads = (self.H, self.N, self.N)
    q, k, v = (
      jax.random.normal(key, (1, self.L, n, self.D), self.dtype)
      for key, n in zip(keys, heads, strict=True)
    )
    return q, k, v

  def entries(self, config: DGAConfig, key: Array) -> tuple[tuple[Array, ...], Bounds]:
    """The seven arrays of `grouped_attention` and the bounds, as the op makes them of tokens."""
    plan, query, entries = plan_and_merge(*self.tokens(key), config=config)
    return (query, *entries), plan.bounds


def entries_seen(bounds: Bounds) -> float:
  """Mean number of entries that a query sees."""
  return sum(
    float((end - start).mean())
    for start, end in (
      (bounds.focal_start, bounds.focal_end),
      (bounds.group_start, bounds.group_end),
      (bounds.window_start, bounds.window_end),
    )
  )
