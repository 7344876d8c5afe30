"""The index arithmetic of the cache equals a token-by-token simulation in Python lists."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dga_jax import DGAConfig
from dga_jax.cache import cache_size
from dga_jax.cache.layout import cache_layout, CacheLayout
from tests.dga_jax.oracle import Oracle


@dataclasses.dataclass
class Simulation:
  """The cache rule of one sequence in Python lists, without keys and values.

  Attributes:
    members: m, tokens of a group.
    focal: f, focal tokens of a block.
    window: w, complete blocks that stay raw.
    origin: position of the first token of the first block.
    compact: the content of each compact entry: ("focal", index among the focal tokens) or
      ("group", index among the groups).
    length: tokens so far.
    pages: the ring of raw tokens, w + 1 pages of positions, one page for each block.
    open_page: page of the incomplete block.
    complete_blocks: for each complete block, the number of compact entries before its own.
  """

  members: int
  focal: int
  window: int
  origin: int
  compact: list
  length: int = 0

  def __post_init__(self):
    self.pages = [[] for _ in range(self.window + 1)]
    self.open_page = 0
    self.complete_blocks = []

  def count(self, kind):
    return sum(entry[0] == kind for entry in self.compact)

  def append(self):
    """Appends a token; returns the compact entries that it sees, and raw positions by ring slot."""
    position, self.length = self.length, self.length + 1
    if position < self.origin:
      self.compact.append(("focal", self.count("focal")))
      return list(range(len(self.compact))), {}
    page, size = self.pages[self.open_page], self.members + self.focal
    page.append(position)
    # The last w complete blocks are visible as raw tokens, earlier blocks as compact entries.
    raw_blocks = self.complete_blocks[-self.window :] if self.window else []
    entries = list(range(raw_blocks[0] if raw_blocks else len(self.compact)))
    slots = {
      number * size + offset: held
      for number, tokens in enumerate(self.pages)
      for offset, held in enumerate(tokens)
    }
    if len(page) == size:
      self.complete_blocks.append(len(self.compact))
      focal, groups = self.count("focal"), self.count("group")
      self.compact += [("focal", focal + i) for i in range(self.focal)] + [("group", groups)]
      self.open_page = (self.open_page + 1) % len(self.pages)
      self.pages[self.open_page] = []
    return entries, slots


@dataclasses.dataclass(frozen=True)
class Prefix:
  """The compact entries before the first block: sinks, or the entries of a global prompt."""

  origin: int
  focal: int
  groups: int
  is_prompt: bool

  def simulation(self, layout):
    rule = Simulation(layout.members, layout.focal, layout.window, self.origin, [])
    if self.is_prompt:
      rule.compact = [("focal", i) for i in range(self.focal)]
      rule.compact += [("group", i) for i in range(self.groups)]
      rule.length = self.origin
    return rule


layouts = st.builds(
  CacheLayout, members=st.integers(1, 6), focal=st.integers(1, 3), window=st.integers(0, 3)
)
sinks = st.integers(0, 5).map(lambda s: Prefix(origin=s, focal=s, groups=0, is_prompt=False))
prompts = st.builds(
  Prefix,
  origin=st.integers(0, 20),
  focal=st.integers(0, 5),
  groups=st.integers(0, 4),
  is_prompt=st.just(True),
)


@given(layout=layouts, prefix=st.one_of(sinks, prompts), tokens=st.integers(1, 60))
@settings(max_examples=150)
def test_every_token_of_a_sequence(layout, prefix, tokens):
  rule = prefix.simulation(layout)
  entries, focal = prefix.focal + prefix.groups, prefix.focal
  for position in range(rule.length, rule.length + tokens):
    seen_entries, seen_slots = rule.append()
    token = layout.locate(position, prefix.origin)
    assert token.position == position
    assert token.in_block == (position >= prefix.origin)
    mask = layout.visible(token, entries)
    assert mask.compact_end == len(seen_entries)
    visible = [slot for slot in range(layout.raw_size) if mask.sees_slot(slot)]
    assert visible == sorted(seen_slots)
    kinds = [rule.compact[entry][0] for entry in seen_entries]
    assert layout.focal_end(token, focal) == kinds.count("focal")
    assert layout.group_end(token, prefix.groups) == kinds.count("group")
    if not token.in_block:
      continue
    assert seen_slots[token.slot] == position
    assert layout.raw_start(token, prefix.origin) == min(seen_slots.values())
    assert layout.raw_tokens(token) == len(seen_slots) - 1
    assert layout.block_start(token.block, prefix.origin) == position - token.offset
    earlier = layout.earlier_blocks(token, entries)
    own_block = {slot for slot, held in seen_slots.items() if held >= position - token.offset}
    assert earlier.compact_end == mask.compact_end
    assert {
      s for s in range(layout.raw_size) if earlier.sees_slot(s)
    } == seen_slots.keys() - own_block
    completed = rule.complete_blocks[token.block :]
    assert layout.completes_block(token) == bool(completed)
    assert layout.block_entry(token.block, entries) == (completed or [len(rule.compact)])[0]
    assert layout.compact_size(position + 1, prefix.origin, entries) == len(rule.compact)
  check_contents(layout, prefix, rule)


def check_contents(layout, prefix, rule):
  """Compares the content of every compact entry and ring slot after the last token."""
  entries, focal = prefix.focal + prefix.groups, prefix.focal
  held = {
    number * layout.block_size + offset: position
    for number, tokens in enumerate(rule.pages)
    for offset, position in enumerate(tokens)
  }
  for slot in range(layout.raw_size):
    position, is_held = layout.ring_positions(slot, rule.length, prefix.origin)
    assert bool(is_held) == (slot in held)
    assert not is_held or position == held[slot]
  if rule.length < prefix.origin:
    return
  for entry, (kind, index) in enumerate(rule.compact):
    assert layout.is_group(entry, entries, focal) == (kind == "group")
    entry_of = layout.group_entry if kind == "group" else layout.focal_entry
    assert entry_of(index, entries, focal) == entry


@given(layout=layouts, prefix=st.one_of(sinks, prompts))
@settings(max_examples=8)
def test_arrays_give_the_same_numbers_as_ints(layout, prefix):
  """Ints, NumPy arrays and JAX arrays under jit give equal indices.

  The jaxpr contains no `sign`, which floor division of signed integers would add.
  """
  entries, focal = prefix.focal + prefix.groups, prefix.focal

  def numbers(position):
    token = layout.locate(position, prefix.origin)
    positions, is_held = layout.ring_positions(position % layout.raw_size, position, prefix.origin)
    return [
      *token,
      token.slot,
      *layout.visible(token, entries),
      *layout.earlier_blocks(token, entries),
      layout.completes_block(token),
      layout.raw_tokens(token),
      layout.raw_start(token, prefix.origin),
      layout.focal_end(token, focal),
      layout.group_end(token, prefix.groups),
      layout.compact_size(position, prefix.origin, entries),
      layout.is_group(position, entries, focal),
      layout.focal_entry(position, entries, focal),
      layout.group_entry(position, entries, focal),
      is_held,
      is_held * positions,
    ]

  position_P = np.arange(50)
  of_numpy = numbers(position_P)
  of_jax = jax.jit(numbers)(jnp.asarray(position_P))
  for position in position_P.tolist():
    for n, number in enumerate(numbers(position)):
      assert number == of_numpy[n][position] == of_jax[n][position], n
  primitives = {eqn.primitive.name for eqn in jax.make_jaxpr(layout.locate)(position_P, 0).eqns}
  assert "sign" not in primitives


@given(
  members=st.integers(1, 5),
  focal=st.integers(1, 3),
  window=st.integers(0, 3),
  sinks=st.integers(0, 4),
  length=st.integers(1, 40),
)
@settings(max_examples=60)
def test_visible_tokens_equal_those_of_the_oracle(members, focal, window, sinks, length):
  """Compares the positions of visible focal tokens, groups and raw tokens."""
  config = DGAConfig(
    selection="streaming",
    group_size=members,
    focal_per_block=focal,
    local_window=window,
    sink_tokens=sinks,
  )
  layout, nothing = cache_layout(config), np.zeros((length, 1, 1))
  oracle = Oracle(nothing, nothing, nothing, config)
  focal_positions = sorted(oracle.focal(0))
  groups = oracle.groups(set(focal_positions))
  for i in range(length):
    raw, over = oracle.visible(i, set(focal_positions), groups)
    token = layout.locate(i, sinks)
    seen_focal = focal_positions[: int(layout.focal_end(token, sinks))]
    start = layout.raw_start(token, sinks) if token.in_block else i + 1
    assert sorted({*seen_focal, *range(start, i + 1)}) == raw
    assert list(range(layout.group_end(token, 0))) == over
    keys = layout.earlier_blocks(token, sinks).compact_end + layout.raw_tokens(token) + 1
    assert keys == len(raw) + len(over)
  assert cache_size(config=config, max_length=length).compact == len(
    [j for j in focal_positions if j < length]
  ) + len(groups)


@pytest.mark.parametrize("max_length", [0, 3, 40])
def test_a_prompt_longer_than_max_length_is_an_error(max_length):
  size = functools.partial(cache_size, config=DGAConfig(), max_length=max_length)
  assert size(prompt=max_length).compact == max_length
  with pytest.raises(ValueError, match=f"max_length={max_length} and prompt={max_length + 1}"):
    size(prompt=max_length + 1)
