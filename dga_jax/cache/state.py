"""The compact cache: focal tokens, merged groups, and a small buffer of raw tokens.

Section by section a sequence's cache grows like this. A prefix (sinks, or what a global prefill
left) is followed by blocks of m + f tokens. A block's tokens wait in the raw buffer; its last
query then chooses f focal tokens and merges the other m, and f + 1 entries join the compact part.
Nothing else moves, so every count follows from the number of tokens seen.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, Shaped

from dga_jax.config import DGAConfig
from pallas_kernels.decode import pack_rows, unpack_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompactCache:
  """Keys and values of one layer, or with a leading axis of several.

  Heads come before entries, so that decoding reads contiguous memory. Entries that are not yet
  written are zero.

  Attributes:
    compact_key: C entries: the prefix, then f focal tokens and one group for every block. In the
      dtype of config.cache_dtype, if that is set.
    compact_value: likewise.
    raw_key: ring of w + 1 blocks of raw tokens, the current block among them.
    raw_value: likewise.
    length: tokens that each sequence has seen.
    origin: position at which blocks begin; earlier tokens are in the prefix.
    prefix: entries of the prefix.
    prefix_focal: how many of them are focal tokens; groups follow.
    key_scale: by what each compact key is multiplied, with config.cache_dtype; else None.
    value_scale: likewise.
  """

  compact_key: Shaped[Array, "*layers B N C D"]
  compact_value: Shaped[Array, "*layers B N C D"]
  raw_key: Float[Array, "*layers B N W D"]
  raw_value: Float[Array, "*layers B N W D"]
  length: Int[Array, "*layers B"]
  origin: Int[Array, "*layers B"]
  prefix: Int[Array, "*layers B"]
  prefix_focal: Int[Array, "*layers B"]
  key_scale: Float[Array, "*layers B N C"] | None = None
  value_scale: Float[Array, "*layers B N C"] | None = None

  @property
  def bytes(self) -> int:
    """Bytes of keys and values, scales included."""
    arrays = (
      *(self.compact_key, self.compact_value, self.key_scale, self.value_scale),
      *(self.raw_key, self.raw_value),
    )
    return sum(array.size * array.dtype.itemsize for array in arrays if array is not None)

  @property
  def compact(self) -> tuple[Float[Array, "*layers B N C D"], Float[Array, "*layers B N C D"]]:
    """Keys and values of the compact part, restored where they are stored in 8 bits."""
    dtype = self.raw_key.dtype
    return (
      unpack_rows(self.compact_key, self.key_scale, dtype),
      unpack_rows(self.compact_value, self.value_scale, dtype),
    )

  def put_compact(
    self, at: tuple[Any, ...], key: Float[Array, "... D"], value: Float[Array, "... D"]
  ) -> "CompactCache":
    """Writes entries at an index of all axes but the last; indices beyond the end write nothing."""

    def put(array: Array, rows: Any) -> Array:
      return array.at[at].set(rows, mode="drop")

    key_numbers, key_scale = pack_rows(key, self.compact_key.dtype)
    value_numbers, value_scale = pack_rows(value, self.compact_value.dtype)
    cache = dataclasses.replace(
      self,
      compact_key=put(self.compact_key, key_numbers),
      compact_value=put(self.compact_value, value_numbers),
    )
    if self.key_scale is None or self.value_scale is None:
      return cache
    return dataclasses.replace(
      cache,
      key_scale=put(self.key_scale, key_scale),
      value_scale=put(self.value_scale, value_scale),
    )


class CacheSize(NamedTuple):
  """Tokens' worth of keys and values that a cache holds for a sequence and layer."""

  compact: int
  raw: int

  @property
  def total(self) -> int:
    """Compact entries and raw tokens."""
    return self.compact + self.raw


def cache_size(
  config: DGAConfig, max_length: int, *, prompt: int = 0, ragged: bool = False
) -> CacheSize:
  """Exact size of the cache of sequences of `max_length` tokens.

  Streaming: s + (f + 1)·⌊(L − s)/m'⌋ compact entries and (w + 1)·m' raw ones. Global and random:
  r + k of the prompt, (f + 1) for every m' tokens after it, and m' raw ones.

  Args:
    max_length: tokens of a sequence, prompt and new ones together.
    prompt: tokens of the (padded) prompt that selection looks at as a whole.
    ragged: prompts may be shorter; the size is then the largest of theirs.
  """
  raw = (config.local_window + 1) * config.block_size
  per_block = config.focal_in_block + 1
  if config.selection == "streaming":
    sinks = min(config.sink_tokens, max_length)
    return CacheSize(sinks + per_block * ((max_length - sinks) // config.block_size), raw)
  quotas = config.focal_quota(prompt)
  entries = quotas + (np.arange(prompt + 1) - quotas) // config.group_size
  most = int(entries.max()) if ragged else int(entries[-1])
  begun = max(prompt, min(config.sink_tokens, max_length))
  blocks = (max_length - (begun if not ragged else prompt)) // config.block_size
  return CacheSize(max(most, min(config.sink_tokens, max_length)) + per_block * blocks, raw)


def empty_cache(
  config: DGAConfig, batch: int, max_length: int, heads: int, head_dim: int, dtype: DTypeLike
) -> CompactCache:
  """A cache that has seen nothing; decoding can start from it."""
  size = cache_size(config, max_length)
  compact, scale = pack_rows(
    jnp.zeros((batch, heads, size.compact, head_dim), dtype), config.cache_dtype or dtype
  )
  raw = jnp.zeros((batch, heads, size.raw, head_dim), dtype)
  zero_B = jnp.zeros(batch, jnp.int32)
  sinks_B = zero_B + config.sink_tokens
  counts = (zero_B, sinks_B, sinks_B, sinks_B)
  return CompactCache(compact, compact, raw, raw, *counts, key_scale=scale, value_scale=scale)


def ring_age(
  block_B: Int[Array, "B"], config: DGAConfig
) -> tuple[Int[Array, "B W"], Int[Array, "W"]]:
  """How many blocks before the current one each raw slot's block lies, and the place in it."""
  window = config.local_window + 1
  slot_W = jnp.arange(window * config.block_size)
  age_BxW = (block_B[:, None] - slot_W[None] // config.block_size) % window
  return age_BxW, slot_W % config.block_size
