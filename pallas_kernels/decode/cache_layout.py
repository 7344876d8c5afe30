"""The rule of the compact cache as index arithmetic: slots, visible ranges and sizes.

The cache of a sequence has a compact part and a raw part:

    compact part    [ prefix | f focal tokens, 1 group | f focal tokens, 1 group | ... ]
    raw part        a ring of w + 1 blocks of m + f tokens

Blocks of m + f tokens begin at position `origin`. Earlier tokens are in the prefix: sink tokens, or
the entries of a prompt. The tokens of a block enter the ring one by one. The last of them completes
the block, which then gets f + 1 compact entries. A query sees the prefix, the compact entries of
blocks older than the w blocks before its own, and the raw tokens of those w blocks and of its own
block up to itself.

Every function takes Python ints, numpy arrays or JAX arrays (traced ones too), and broadcasts.
Array values never decide a branch, and division truncates (`lax.div`, `lax.rem`), so that the same
code runs in Triton kernels, in Mosaic TPU kernels, in XLA programs and in plain Python. Positions
and lengths are not negative.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

type Index = Any  # an int, or a numpy or JAX array of integers
type Flag = Any  # a bool, or a numpy or JAX array of bools


class TokenCoords(NamedTuple):
  """A token's block and its slot in the ring of raw tokens.

  Attributes:
    position: in the sequence, counted from 0.
    in_block: whether the token belongs to a block. Tokens of the prefix do not, and their other
      coordinates are 0.
    block: ordinal of the token's block.
    offset: of the token in its block.
    block_slot: raw slot of the block's first token.
  """

  position: Index
  in_block: Flag
  block: Index
  offset: Index
  block_slot: Index

  @property
  def slot(self) -> Index:
    """Raw slot of the token."""
    return self.block_slot + self.offset


class CacheMask(NamedTuple):
  """What a query sees: compact entries [0, compact_end), raw slots [0, raw_end) except a gap.

  Slots [hidden_start, hidden_end) of the ring are hidden: they hold the oldest block, which has
  left the window and is being overwritten.
  """

  compact_end: Index
  raw_end: Index
  hidden_start: Index
  hidden_end: Index

  def sees_entry(self, entry: Index) -> Flag:
    """Whether compact entries are visible."""
    return entry < self.compact_end

  def sees_slot(self, slot: Index) -> Flag:
    """Whether raw slots are visible."""
    return (slot < self.raw_end) & ((slot < self.hidden_start) | (slot >= self.hidden_end))


class CacheLayout(NamedTuple):
  """The layout of a compact cache.

  Attributes:
    members: m, tokens of a block that are merged into its group.
    focal: f, tokens of a block that stay exact.
    window: w, blocks before a query's own block that the query sees raw.
  """

  members: int
  focal: int
  window: int

  @property
  def block_size(self) -> int:
    """m + f: tokens of a block."""
    return self.members + self.focal

  @property
  def entries_per_block(self) -> int:
    """f + 1: compact entries of a complete block."""
    return self.focal + 1

  @property
  def raw_size(self) -> int:
    """(w + 1)·(m + f): slots of the ring."""
    return (self.window + 1) * self.block_size

  def locate(self, position: Index, origin: Index) -> TokenCoords:
    """The coordinates of the token at a position."""
    after = position - origin
    in_block = after >= 0
    after = _at_least(after, 0)
    block, offset = _div(after, self.block_size), _rem(after, self.block_size)
    block_slot = _rem(block, self.window + 1) * self.block_size
    return TokenCoords(position, in_block, block, offset, block_slot)

  def block_start(self, block: Index, origin: Index) -> Index:
    """The position of a block's first token."""
    return origin + self.block_size * block

  def compact_blocks(self, block: Index) -> Index:
    """How many blocks, the oldest ones, a query of `block` sees by their compact entries."""
    return _at_least(block - self.window, 0)

  def block_entry(self, block: Index, prefix: Index) -> Index:
    """The first compact entry of a block: f focal tokens in order of position, then the group."""
    return prefix + self.entries_per_block * block

  def completes_block(self, token: TokenCoords) -> Flag:
    """Whether the token is the last one of its block."""
    return token.in_block & (token.offset == self.block_size - 1)

  def earlier_blocks(self, token: TokenCoords, prefix: Index) -> CacheMask:
    """What a token sees of the cache without its own block: the gap is the own block.

    A token of the prefix sees the entries of the prefix before it.
    """
    compact_end = self.block_entry(self.compact_blocks(token.block), prefix)
    is_full = token.block >= self.window
    raw_end = _where(is_full, self.raw_size, token.block_slot)
    return CacheMask(
      compact_end=_where(token.in_block, compact_end, token.position),
      raw_end=_where(token.in_block, raw_end, 0),
      hidden_start=token.block_slot,
      hidden_end=token.block_slot + self.block_size,
    )

  def visible(self, token: TokenCoords, prefix: Index) -> CacheMask:
    """What a token sees, itself included, once the cache holds it."""
    earlier = self.earlier_blocks(token, prefix)
    own_end = _where(token.in_block, token.slot + 1, 0)
    return CacheMask(
      compact_end=_where(token.in_block, earlier.compact_end, token.position + 1),
      raw_end=_at_least(own_end, earlier.raw_end),
      hidden_start=own_end,
      hidden_end=earlier.hidden_end,
    )

  def raw_tokens(self, token: TokenCoords) -> Index:
    """How many raw tokens a token sees, itself not counted."""
    return _at_most(token.block, self.window) * self.block_size + token.offset

  def raw_start(self, token: TokenCoords, origin: Index) -> Index:
    """The position of the first raw token that a token of a block sees."""
    return self.block_start(self.compact_blocks(token.block), origin)

  def ring_positions(self, slot: Index, length: Index, origin: Index) -> tuple[Index, Flag]:
    """The position of the token in a raw slot after `length` tokens, and whether there is one."""
    ring = self.window + 1
    block = self.locate(length, origin).block
    age = _rem(block + (ring - _div(slot, self.block_size)), ring)
    position = self.block_start(block - age, origin) + _rem(slot, self.block_size)
    return position, (age <= block) & (position < length)

  def is_group(self, entry: Index, prefix: Index, prefix_focal: Index) -> Flag:
    """Whether compact entries are groups; the first `prefix_focal` of the prefix are focal."""
    after = entry - prefix
    ends_block = _rem(after, self.entries_per_block) == self.focal
    return ((after < 0) & (entry >= prefix_focal)) | ((after >= 0) & ends_block)

  def focal_entry(self, index: Index, prefix: Index, prefix_focal: Index) -> Index:
    """The compact entry of a focal token, by its index among the focal tokens of the cache."""
    later = index - prefix_focal
    entry = self.block_entry(_div(later, self.focal), prefix) + _rem(later, self.focal)
    return _where(later < 0, index, entry)

  def group_entry(self, index: Index, prefix: Index, prefix_focal: Index) -> Index:
    """The compact entry of a group, by its index among the groups of the cache."""
    later = index - (prefix - prefix_focal)
    entry = self.block_entry(later, prefix) + self.focal
    return _where(later < 0, prefix_focal + index, entry)

  def focal_end(self, token: TokenCoords, prefix_focal: Index) -> Index:
    """How many focal tokens of the cache a token sees; in the prefix, itself included."""
    end = prefix_focal + self.focal * self.compact_blocks(token.block)
    return _where(token.in_block, end, token.position + 1)

  def group_end(self, token: TokenCoords, prefix_groups: Index) -> Index:
    """How many groups of the cache a token sees."""
    return _where(token.in_block, prefix_groups + self.compact_blocks(token.block), 0)

  def compact_size(self, length: Index, origin: Index, prefix: Index) -> Index:
    """Compact entries of a sequence of `length` tokens."""
    return self.block_entry(self.locate(length, origin).block, prefix)


def _numpy(*values: Index) -> Any:
  """jax.numpy where a value is a JAX array, else numpy."""
  return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _where(flag: Flag, x: Index, y: Index) -> Index:
  return _numpy(flag, x, y).where(flag, x, y)


def _at_least(x: Index, least: Index) -> Index:
  return _numpy(x, least).maximum(x, least)


def _at_most(x: Index, most: Index) -> Index:
  return _numpy(x, most).minimum(x, most)


def _div(x: Index, y: int) -> Index:
  """The quotient, rounded towards 0: one instruction, where `//` takes several on a JAX array."""
  return lax.div(x, x.dtype.type(y)) if isinstance(x, jax.Array) else x // y


def _rem(x: Index, y: int) -> Index:
  """The remainder that belongs to `_div`."""
  return lax.rem(x, x.dtype.type(y)) if isinstance(x, jax.Array) else x % y
