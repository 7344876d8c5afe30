"""The records of caches that decoding takes: arrays, lengths, and the rule of a block."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import DTypeLike, Float, Int, Shaped

from pallas_kernels.decode.cache_layout import CacheLayout
from pallas_kernels.decode.quantise import pack_rows, unpack_rows
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


class TokenRows(NamedTuple):
  """Keys and values of tokens in a cache, of one layer or with a leading axis of layers.

  Attributes:
    key: of M entries, in 8 bits or in the dtype of the model.
    value: likewise.
    key_scale: the factor of each key that is stored in 8 bits, see `pack_rows`; else None.
    value_scale: likewise.
  """

  key: Shaped[Array, "*layers B N M D"]
  value: Shaped[Array, "*layers B N M D"]
  key_scale: Float[Array, "*layers B N M"] | None = None
  value_scale: Float[Array, "*layers B N M"] | None = None

  @classmethod
  def empty(cls, shape: Sequence[int], dtype: DTypeLike) -> "TokenRows":
    """Rows of zeros in the dtype of a cache; the shape includes D."""
    rows = cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    if jnp.dtype(dtype).itemsize > 1:
      return rows
    # `pack_rows` of zeros has the scale 1.
    one, other = (jnp.ones(shape[:-1], jnp.float32) for _ in range(2))
    return rows._replace(key_scale=one, value_scale=other)

  @classmethod
  def pack(
    cls, key: Float[Array, "*S D"], value: Float[Array, "*S D"], dtype: DTypeLike
  ) -> "TokenRows":
    """The rows in the dtype of a cache: "int8", "float8_e4m3fn", or a wider float dtype."""
    (key, key_scale), (value, value_scale) = (pack_rows(x, dtype) for x in (key, value))
    return cls(key, value, key_scale, value_scale)

  def unpack(self, dtype: DTypeLike) -> tuple[Float[Array, "*S D"], Float[Array, "*S D"]]:
    """The keys and values in the dtype of the model."""
    return (
      unpack_rows(self.key, self.key_scale, dtype),
      unpack_rows(self.value, self.value_scale, dtype),
    )

  def layer(self, index: Int[Array, ""] | int) -> "TokenRows":
    """The rows of one layer."""
    one: TokenRows = jax.tree.map(lambda x: x[index], self)
    return one

  def write(self, at: tuple[Any, ...], rows: "TokenRows") -> "TokenRows":
    """Writes packed rows.

    Args:
      at: index of all axes of the keys but the last. Entries beyond the end are dropped.
      rows: in the dtype of these rows.
    """
    written: TokenRows = jax.tree.map(
      lambda array, new: array.at[at].set(new, mode="drop"), self, rows
    )
    return written


class TokenArrays(NamedTuple):
  """The arrays of a cache of raw tokens, of all layers, or references to those of a head.

  Attributes:
    tokens: W entries.
    sinks: the first S tokens, which are not among the W entries; None where there are none.
  """

  tokens: TokenRows
  sinks: TokenRows | None = None


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
    return tuple(rows.key.shape[-2] for rows in self.arrays if rows is not None)


type HeadCache = CompactHeads | TokenHeads
