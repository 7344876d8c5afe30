"""What a sequence sees of its cache, and which compact entries stand for groups."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped


class CacheMask(NamedTuple):
  """Per sequence: compact entries [0, compact_end), raw tokens [0, raw_end) but for a gap.

  The raw tokens lie in a ring: where the oldest are about to be written anew there is a gap of
  hidden ones, [hidden_start, hidden_end).
  """

  compact_end: Int[Array, "B"]
  raw_end: Int[Array, "B"]
  hidden_start: Int[Array, "B"]
  hidden_end: Int[Array, "B"]

  def mask(self, compact: int, raw: int) -> Bool[Array, "B S"]:
    """Of the compact entries, then the raw tokens."""
    entry_1xC, slot_1xW = jnp.arange(compact)[None], jnp.arange(raw)[None]
    raw_BxW = raw_is_visible(slot_1xW, *(bound_B[:, None] for bound_B in self[1:]))
    return jnp.concatenate([entry_1xC < self.compact_end[:, None], raw_BxW], axis=1)


def raw_is_visible(slot: Array, end: Array, hidden_start: Array, hidden_end: Array) -> Array:
  """Whether raw slots are seen; see `CacheMask`."""
  return (slot < end) & ((slot < hidden_start) | (slot >= hidden_end))


class CacheArrays(NamedTuple):
  """The arrays of a cache, all layers'.

  Scales belong to a cache whose compact entries are stored in 8 bits: an entry is its row times
  its scale.
  """

  compact_key: Shaped[Array, "layers B N C D"]
  compact_value: Shaped[Array, "layers B N C D"]
  raw_key: Float[Array, "layers B N W D"]
  raw_value: Float[Array, "layers B N W D"]
  key_scale: Float[Array, "layers B N C"] | None = None
  value_scale: Float[Array, "layers B N C"] | None = None

  def arrays(self) -> list[Array]:
    """Those that there are, in this order."""
    return [x for x in self if x is not None]


class CacheLengths(NamedTuple):
  """How far every layer has come with every sequence.

  Blocks begin at position `origin`. Earlier tokens are in the prefix: `prefix` entries, the first
  `prefix_focal` of them focal tokens and the others groups.
  """

  length: Int[Array, "layers B"]
  origin: Int[Array, "layers B"]
  prefix: Int[Array, "layers B"]
  prefix_focal: Int[Array, "layers B"]


class BlockRule(NamedTuple):
  """What becomes of a block of tokens once it is complete.

  Its last query keeps `focal` tokens, by softmax(choice_scale · q Kᵀ), and merges the other
  `members` by softmax(merge_scale · q Kᵀ). `window` earlier blocks are seen raw beside it.
  """

  members: int
  focal: int
  window: int
  choice_scale: float
  merge_scale: float

  @property
  def size(self) -> int:
    """Tokens of a block."""
    return self.members + self.focal


class GroupBias(NamedTuple):
  """What is added to the logits of groups, and which compact entries they are.

  In a prefix of `prefix` entries those from `first` on; behind it every `period`-th.
  """

  amount: float
  first: Int[Array, "B"]
  prefix: Int[Array, "B"]
  period: int

  def of(self, compact: int) -> Float[Array, "B C"]:
    """Of each compact entry."""
    entry_1xC = jnp.arange(compact)[None]
    return self.amount * is_group(
      entry_1xC, self.first[:, None], self.prefix[:, None], self.period
    ).astype(jnp.float32)


def is_group(entry: Array, first: Array, prefix: Array, period: int) -> Array:
  """Whether entries stand for a group; see `GroupBias`."""
  behind = (entry - prefix) % period == period - 1
  return ((entry < prefix) & (entry >= first)) | ((entry >= prefix) & behind)
