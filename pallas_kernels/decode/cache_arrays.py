"""The records of caches that decoding takes: arrays, lengths, and the rule of a block."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.decode.cache_layout import CacheLayout
from pallas_kernels.decode.quantise import unpack_rows
from pallas_kernels.head_range import HeadRange


class CacheArrays(NamedTuple):
  """Keys and values of a cache, of one layer or with a leading axis of layers.

  Heads come before entries, so that decoding reads contiguous memory.

  Attributes:
    compact_key: C entries: the prefix, then the entries of each block. In 8 bits or in the dtype of
      the raw tokens.
    compact_value: likewise.
    raw_key: the ring of W raw tokens.
    raw_value: likewise.
    key_scale: the factor of each compact key that is stored in 8 bits; else None.
    value_scale: likewise.
    block_score: the focal score of each of the s tokens of the unfinished block, by the token's
      offset; None where the last query of a block chooses its focal tokens.
  """

  compact_key: Shaped[Array, "*layers B N C D"]
  compact_value: Shaped[Array, "*layers B N C D"]
  raw_key: Float[Array, "*layers B N W D"]
  raw_value: Float[Array, "*layers B N W D"]
  key_scale: Float[Array, "*layers B N C"] | None = None
  value_scale: Float[Array, "*layers B N C"] | None = None
  block_score: Float[Array, "*layers B N s"] | None = None

  def present(self) -> list[Array]:
    """The arrays that are not None, in field order."""
    return [x for x in self if x is not None]

  def unpack(self, layer: Int[Array, ""] | int) -> "CacheArrays":
    """The keys and values of one layer, [1, B, ...], all in the dtype of the raw tokens."""
    one = jax.tree.map(lambda x: x[layer][None], self)
    key, value = one.compact
    return CacheArrays(key, value, one.raw_key, one.raw_value)

  @property
  def compact(self) -> tuple[Float[Array, "*layers B N C D"], Float[Array, "*layers B N C D"]]:
    """Compact keys and values, in the dtype of the raw tokens."""
    dtype = self.raw_key.dtype
    return (
      unpack_rows(self.compact_key, self.key_scale, dtype),
      unpack_rows(self.compact_value, self.value_scale, dtype),
    )


class CacheLengths(NamedTuple):
  """How many tokens each sequence has, and what its prefix holds.

  Attributes:
    length: tokens that the sequence has seen.
    origin: position at which blocks begin; earlier tokens are in the prefix.
    prefix: compact entries of the prefix.
    prefix_focal: how many of them, the first ones, are focal tokens; the others are groups.
  """

  length: Int[Array, "*layers B"]
  origin: Int[Array, "*layers B"]
  prefix: Int[Array, "*layers B"]
  prefix_focal: Int[Array, "*layers B"]


class BlockRule(NamedTuple):
  """How a complete block becomes compact entries.

  Of the block's tokens, f stay focal: those with the highest focal scores, or in a cache without
  scores those with the largest softmax(choice_scale · q Kᵀ) for the last query q of the block. The
  same query merges the other m with the weights softmax(merge_scale · q Kᵀ).
  """

  layout: CacheLayout
  choice_scale: float
  merge_scale: float


class GroupBias(NamedTuple):
  """A number that is added to the logits of groups, and what tells groups from focal tokens."""

  amount: float
  layout: CacheLayout
  prefix: Int[Array, "B"]
  prefix_focal: Int[Array, "B"]

  def of_entries(self, count: int) -> Float[Array, "B C"]:
    """The bias of each of the first `count` compact entries."""
    is_group_BxC = self.layout.is_group(
      jnp.arange(count, dtype=jnp.int32)[None], self.prefix[:, None], self.prefix_focal[:, None]
    )
    return self.amount * is_group_BxC.astype(jnp.float32)


class TokenArrays(NamedTuple):
  """Arrays [layers, B, N, entries, D], or references to those of a head, of a cache of raw tokens.

  Attributes:
    key: of W entries.
    value: likewise.
    sink_key: of the first S tokens, which are not among the W entries; None where there are none.
    sink_value: likewise.
  """

  key: Float[Array, "layers B N W D"]
  value: Float[Array, "layers B N W D"]
  sink_key: Float[Array, "layers B N S D"] | None = None
  sink_value: Float[Array, "layers B N S D"] | None = None


class CompactHeads(NamedTuple):
  """Heads with a compact cache; see `step_in_place`."""

  heads: HeadRange
  arrays: CacheArrays  # of these heads
  lengths: CacheLengths
  rule: BlockRule
  group_bias: float

  @property
  def sizes(self) -> tuple[int, ...]:
    """Entries of each array of keys of a head."""
    return self.arrays.compact_key.shape[-2], self.arrays.raw_key.shape[-2]


class TokenHeads(NamedTuple):
  """Heads with a cache of raw tokens: of all tokens, or of sinks and a window."""

  heads: HeadRange
  arrays: TokenArrays  # of these heads
  length: Int[Array, "layers B"]
  is_ring: bool  # see `TokenStep`

  @property
  def lengths(self) -> tuple[Array, ...]:
    """The lengths alone, as `CompactHeads` have more arrays."""
    return (self.length,)

  @property
  def sizes(self) -> tuple[int, ...]:
    """Entries of each array of keys of a head."""
    arrays = (self.arrays.key, self.arrays.sink_key)
    return tuple(x.shape[-2] for x in arrays if x is not None)


type HeadCache = CompactHeads | TokenHeads
