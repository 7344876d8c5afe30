"""Random inputs of the attention benchmarks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from dga_jax import DGAConfig
from pallas_kernels.grouped_attention import Bounds


@dataclasses.dataclass(frozen=True)
class Shape:
  """One row of a table: batch 1, L queries, H query heads, N KV heads, head dim D."""

  L: int
  H: int
  N: int
  D: int
  dtype: str = "bfloat16"

  @functools.partial(jax.jit, static_argnums=0)
  def tokens(self, key: Array) -> tuple[Array, Array, Array]:
    """Query, key and value."""
    keys = jax.random.split(key, 3)
    heads = (self.H, self.N, self.N)
    q, k, v = (
      jax.random.normal(key, (1, self.L, n, self.D), self.dtype)
      for key, n in zip(keys, heads, strict=True)
    )
    return q, k, v


@functools.partial(jax.jit, static_argnums=(0, 1))
def grouped_inputs(shape: Shape, config: DGAConfig, key: Array) -> tuple[tuple[Array, ...], Bounds]:
  """The seven arrays of `grouped_attention` and bounds as the config's selection makes them.

  Under global selection random tokens are focal, as many as the config asks for.
  """
  L, N, m = shape.L, shape.N, config.group_size
  zero_NxL = jnp.zeros((N, L), jnp.int32)
  i_L = jnp.arange(L, dtype=jnp.int32)
  key, order_key = jax.random.split(key)
  if config.selection == "streaming":
    block = config.block_size
    done_NxL = jnp.broadcast_to(i_L // block, (N, L))
    focal_NxL = done_NxL * (block - m)
    group_NxL, open_NxL = done_NxL, done_NxL * block
    end_NxL = jnp.broadcast_to(i_L + 1, (N, L))
    sizes = (L // block * (block - m), L // block, L)
  else:
    r = focal_count(shape, config)
    rank_NxL = jax.random.uniform(order_key, (N, L)).argsort(axis=-1).argsort(axis=-1)
    focal_NxL = jnp.cumsum(rank_NxL < r, axis=-1, dtype=jnp.int32)
    end_NxL = i_L[None] + 1 - focal_NxL
    group_NxL = end_NxL // m
    open_NxL = group_NxL * m
    sizes = (r, (L - r) // m, L - r)
  fields = (zero_NxL, focal_NxL, zero_NxL, group_NxL, open_NxL, end_NxL)
  bounds = Bounds(*(x[None] for x in fields))
  shapes = [(1, L, shape.H, shape.D)]
  shapes += [(1, size, N, shape.D) for size in sizes for _ in range(2)]
  keys = jax.random.split(key, len(shapes))
  arrays = tuple(
    jax.random.normal(key, s, shape.dtype) for key, s in zip(keys, shapes, strict=True)
  )
  return arrays, bounds


def focal_count(shape: Shape, config: DGAConfig) -> int:
  """r: focal tokens under global selection."""
  least = -(-round(1e6 * config.importance_rate * shape.L) // 10**6)
  r = min(shape.L, max(least, config.min_focal_tokens))
  return r + (shape.L - r) % config.group_size


def attention_flops(shape: Shape, bounds: Bounds) -> float:
  """Floating-point operations of the forward's two products over what queries see."""
  seen = sum(
    (end - start).mean()
    for start, end in (
      (bounds.focal_start, bounds.focal_end),
      (bounds.group_start, bounds.group_end),
      (bounds.window_start, bounds.window_end),
    )
  )
  return 4.0 * shape.D * shape.H * shape.L * float(seen)
