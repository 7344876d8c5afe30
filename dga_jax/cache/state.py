"""The compact cache: focal tokens, merged groups, and a ring of raw tokens.

A sequence's compact part begins with a prefix: sink tokens, or the entries of a prompt under global
selection. Blocks of m + f tokens follow. The tokens of a block enter the ring of raw tokens. When
the block is complete, f of its tokens stay focal and the other m are merged (see `summary`), and
these f + 1 entries join the compact part. No entry ever moves, so every index follows from the
number of tokens seen (`pallas_kernels.decode.cache_layout`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from dga_jax.cache.layout import cache_size, CacheSettings
from dga_jax.config import DGAConfig
from pallas_kernels.decode import CacheArrays, CacheLengths, pack_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompactCache:
  """The compact cache of a batch of sequences. A pytree.

  It holds one layer, or several on a leading axis of every array, which `decode_step` and `extend`
  take with their `layer` argument.

  Attributes:
    arrays: keys and values. Entries that are not yet written are 0.
    lengths: tokens of each sequence, and what its prefix holds.
    max_length: tokens that the cache was made for; static.
    settings: that every call with this cache must have; static.
  """

  arrays: CacheArrays
  lengths: CacheLengths
  max_length: int = dataclasses.field(metadata={"static": True})
  settings: CacheSettings = dataclasses.field(metadata={"static": True})

  @property
  def length(self) -> Int[Array, "*layers B"]:
    """Tokens that each sequence has seen."""
    return self.lengths.length

  @property
  def bytes(self) -> int:
    """Bytes of all arrays."""
    return sum(array.size * array.dtype.itemsize for array in self.arrays.present())

  def write_compact(
    self, at: tuple[Any, ...], key: Float[Array, "... D"], value: Float[Array, "... D"]
  ) -> "CompactCache":
    """Writes compact entries, in 8 bits where the cache has scales.

    Args:
      at: index of all axes of the compact keys but the last. Entries beyond the end are dropped.
      key: the rows to write.
      value: likewise.
    """
    arrays = self.arrays

    def write(array: Array | None, rows: Array | None) -> Any:
      return None if array is None else array.at[at].set(rows, mode="drop")

    key_rows, key_scale = pack_rows(key, arrays.compact_key.dtype)
    value_rows, value_scale = pack_rows(value, arrays.compact_value.dtype)
    written = arrays._replace(
      compact_key=write(arrays.compact_key, key_rows),
      compact_value=write(arrays.compact_value, value_rows),
      key_scale=write(arrays.key_scale, key_scale),
      value_scale=write(arrays.value_scale, value_scale),
    )
    return dataclasses.replace(self, arrays=written)


def empty_cache(
  *,
  config: DGAConfig,
  batch: int,
  max_length: int,
  num_kv_heads: int,
  head_dim: int,
  dtype: DTypeLike,
) -> CompactCache:
  """The cache of one layer before the first token; decoding and `extend` can start from it.

  Args:
    config: its `cache_dtype` stores compact entries in 8 bits.
    batch: sequences.
    max_length: tokens that the cache holds for a sequence.
    num_kv_heads: N.
    head_dim: D.
    dtype: of queries, keys and values.

  Raises:
    ValueError: if a size is below 1.
  """
  shape = {"batch": batch, "max_length": max_length, "heads": num_kv_heads, "head_dim": head_dim}
  if min(shape.values()) < 1:
    raise ValueError(f"empty_cache got {shape}; every size must be at least 1.")
  size = cache_size(config=config, max_length=max_length)

  def zeros(entries: int) -> Array:
    return jnp.zeros((batch, num_kv_heads, entries, head_dim), dtype)

  stored = config.cache_dtype or dtype
  compact_key, key_scale = pack_rows(zeros(size.compact), stored)
  compact_value, value_scale = pack_rows(zeros(size.compact), stored)
  arrays = CacheArrays(
    compact_key=compact_key,
    compact_value=compact_value,
    raw_key=zeros(size.raw),
    raw_value=zeros(size.raw),
    key_scale=key_scale,
    value_scale=value_scale,
  )
  if config.selector == "fitted":
    score_shape = (batch, num_kv_heads, config.block_size)
    arrays = arrays._replace(block_score=jnp.zeros(score_shape, jnp.float32))
  return CompactCache(
    arrays,
    lengths_with_sinks(jnp.zeros(batch, jnp.int32), config.sink_tokens),
    max_length,
    CacheSettings.from_config(config),
  )


def lengths_with_sinks(length_B: Int[Array, "B"], sinks: int) -> CacheLengths:
  """The lengths of sequences whose prefix is their sinks.

  No two fields share a buffer: a donated cache must not hold a buffer twice.
  """
  origin, prefix, prefix_focal = (jnp.full(length_B.shape, sinks, jnp.int32) for _ in range(3))
  return CacheLengths(length_B, origin, prefix, prefix_focal)
