"""Shapes, axes and bytes of a decoder's cache, found by tracing: any pytree of arrays works.

The engine treats a cache as opaque. An axis of an array is the batch axis if its size follows the
number of sequences. In every cache the axis after the batch axis is the KV heads', if it has as
many entries.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool

from dga_jax.model import Decoder
from dga_jax.model.config import ModelConfig


class CacheShapes:
  """The cache of a decoder, by batch size and length.

  Args:
    model: the decoder.
    max_length: tokens for which a sequence's cache has room.
  """

  def __init__(self, model: Decoder, max_length: int) -> None:
    structure, params = nnx.split(model)
    # Shapes in place of weights: `init_cache` reads the config alone.
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    self._model: Decoder = nnx.merge(structure, abstract)
    self.max_length = max_length
    self.row_bytes = all_bytes(self.rows(1))

  def rows(self, batch: int, max_length: int | None = None) -> Any:
    """Shapes of `model.init_cache`."""
    length = self.max_length if max_length is None else max_length
    return jax.eval_shape(lambda: self._model.init_cache(batch, length))

  def batch_axes(self) -> list[int | None]:
    """The batch axis of every array, in the order of `jax.tree.leaves`; None without one."""
    return [
      next((i for i, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if x != y), None)
      for a, b in zip(jax.tree.leaves(self.rows(2)), jax.tree.leaves(self.rows(3)), strict=True)
    ]

  def trim(self, row: list[np.ndarray], length: int) -> list[np.ndarray]:
    """The arrays of one sequence of `length` tokens, cut to the entries that it uses."""
    return [
      np.ascontiguousarray(x[tuple(map(slice, shape.shape))])
      for x, shape in zip(row, jax.tree.leaves(self._trimmed(length)), strict=True)
    ]

  def trimmed_bytes(self, length: int) -> int:
    """Bytes of the result of `trim`."""
    return all_bytes(self._trimmed(length))

  def _trimmed(self, length: int) -> Any:
    return self.rows(1, min(_round_up(length), self.max_length))

  def pad(self, row: list[np.ndarray]) -> list[np.ndarray]:
    """The inverse of `trim`: zeros in the entries that are not used."""
    padded = []
    for x, shape in zip(row, jax.tree.leaves(self.rows(1)), strict=True):
      whole = np.zeros(shape.shape, shape.dtype)
      whole[tuple(map(slice, x.shape))] = x
      padded.append(whole)
    return padded


def _round_up(length: int) -> int:
  return max(64, -(-length // 64) * 64)


def hold_lengths(
  before: Any, after: Any, batch_axes: Sequence[int | None], held_B: Bool[Array, "B"]
) -> Any:
  """The cache `after` a decode step, with the counts of tokens of `before` in some rows.

  Args:
    before: a traced cache.
    after: the cache with one more token in every row.
    batch_axes: of every array, see `CacheShapes.batch_axes`.
    held_B: the rows whose counts do not change. Counts are the int32 arrays of a cache.
  """

  def hold(old: Array, new: Array, axis: int | None) -> Array:
    if axis is None or new.dtype != jnp.int32:
      return new
    shape = [-1 if i == axis else 1 for i in range(new.ndim)]
    return jnp.where(held_B.reshape(shape), old, new)

  leaves, structure = jax.tree.flatten(after)
  held = map(hold, jax.tree.leaves(before), leaves, batch_axes)
  return jax.tree.unflatten(structure, list(held))


def content_bytes(cache: Any) -> int:
  """Bytes of keys and values, with scales: all arrays of a cache but counts of tokens (int32)."""
  leaves = [x for x in jax.tree.leaves(cache) if x.dtype != jnp.int32]
  return sum(x.size * x.dtype.itemsize for x in leaves)


def all_bytes(cache: Any) -> int:
  """Bytes of all arrays."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def dense_bytes(config: ModelConfig, length: int) -> int:
  """Bytes of a dense cache for as many tokens of one sequence."""
  entry = config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
  return 2 * config.num_layers * length * entry
