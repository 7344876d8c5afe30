"""From a focal mask to index arrays and to the ranges that each query sees.

Both layouts keep every list in position order, so that what a query sees is contiguous in each.
Counting (cumulative sums) and one scatter per list replace any sort.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dga_jax.attention.segments import Documents, positions
from dga_jax.attention.visibility import Visibility
from dga_jax.config import DGAConfig
from pallas_kernels.compact_indices import compact_indices


class Sizes(NamedTuple):
  """Static sizes of the lists, bounds over the rows of a batch."""

  focal: int
  groups: int


class Layout(NamedTuple):
  """Index arrays into the row. Entries that a row does not fill hold L."""

  focal_index: Int[Array, "B N r"]
  member_index: Int[Array, "B N k m"]
  group_query: Int[Array, "B N k"]  # whose attention weighs the members of a group
  bounds: Visibility


def global_layout(
  focal_BxNxL: Bool[Array, "B N L"], documents: Documents, sizes: Sizes, config: DGAConfig
) -> Layout:
  """Groups of m consecutive non-focal tokens; the window is the list of non-focal tokens.

  With c the number of non-focal tokens of the document at positions ≤ i (rule "exclusive":
  < i), query i sees the first ⌊c/m⌋ groups and list entries from m·⌊c/m⌋ up to itself. A
  document's part of the list is padded to whole groups, so that group g is entries
  [g·m, (g + 1)·m).
  """
  m = config.group_size
  nonfocal_BxNxL = documents.is_token[:, None] & ~focal_BxNxL
  focal_before_BxNxL = count_before(focal_BxNxL)
  nonfocal_before_BxNxL = count_before(nonfocal_BxNxL)

  begun_BxNxL = nonfocal_before_BxNxL - _at_start(nonfocal_before_BxNxL, documents)
  upto_BxNxL = begun_BxNxL + nonfocal_BxNxL
  fill_BxNxL = jnp.where(documents.is_last[:, None], -upto_BxNxL % m, 0)
  slot_BxNxL = count_before(nonfocal_BxNxL + fill_BxNxL)
  section_BxNxL = _at_start(slot_BxNxL, documents)

  seen_BxNxL = (upto_BxNxL if config.visibility == "inclusive" else begun_BxNxL) // m
  window_end_BxNxL = section_BxNxL + upto_BxNxL
  window_start_BxNxL = section_BxNxL + seen_BxNxL * m
  member_index = compact_indices(slot_BxNxL, nonfocal_BxNxL, sizes.groups * m)
  member_index = member_index.reshape(*member_index.shape[:2], sizes.groups, m)
  return Layout(
    focal_index=compact_indices(focal_before_BxNxL, focal_BxNxL, sizes.focal),
    member_index=member_index,
    group_query=member_index[..., -1],
    bounds=Visibility(
      focal_start=_at_start(focal_before_BxNxL, documents),
      focal_end=focal_before_BxNxL + focal_BxNxL,
      group_start=section_BxNxL // m,
      group_end=section_BxNxL // m + seen_BxNxL,
      window_start=window_start_BxNxL if config.complementary else window_end_BxNxL,
      window_end=window_end_BxNxL,
    ),
  )


def streaming_layout(
  focal_BxNxL: Bool[Array, "B N L"], documents: Documents, sizes: Sizes, config: DGAConfig
) -> Layout:
  """One group a complete block of m + f tokens; the window is the row itself.

  Query i of block b sees the summaries of blocks before b − w and the raw tokens from block
  b − w up to itself. Sinks come before the first block and are focal.
  """
  f, size = config.focal_in_block, config.block_size
  blocks = StreamingBlocks.of(documents, config)
  focal_BxNxL = (focal_BxNxL & blocks.complete[:, None]) | blocks.sink[:, None]
  member_BxNxL = blocks.complete[:, None] & ~focal_BxNxL
  B, N, _ = focal_BxNxL.shape
  member_index = compact_indices(
    count_before(member_BxNxL), member_BxNxL, sizes.groups * (size - f)
  )
  end_BxL = blocks.complete & (blocks.offset == size - 1)
  group_query_Bxk = compact_indices(count_before(end_BxL), end_BxL, sizes.groups)
  return Layout(
    focal_index=compact_indices(count_before(focal_BxNxL), focal_BxNxL, sizes.focal),
    member_index=member_index.reshape(B, N, sizes.groups, size - f),
    group_query=jnp.broadcast_to(group_query_Bxk[:, None], (B, N, sizes.groups)),
    bounds=streaming_bounds(documents, config),
  )


def streaming_bounds(documents: Documents, config: DGAConfig) -> Visibility:
  """What each query sees under streaming selection, whatever the blocks choose."""
  f, size, sinks = config.focal_in_block, config.block_size, config.sink_tokens
  blocks = StreamingBlocks.of(documents, config)
  focal_start_BxL = streaming_focal_start(documents, config)
  group_start_BxL = _at_start(count_before(documents.is_last * blocks.count), documents)
  seen_BxL = jnp.maximum(blocks.index - config.local_window, 0)
  i_BxL = jnp.broadcast_to(positions(seen_BxL), seen_BxL.shape)
  after_sinks_BxL = documents.is_token & ~blocks.sink
  window_end_BxL = i_BxL + documents.is_token
  bounds_BxL = Visibility(
    focal_start=focal_start_BxL,
    focal_end=focal_start_BxL
    + jnp.where(after_sinks_BxL, sinks + f * seen_BxL, (documents.position + 1) * blocks.sink),
    group_start=group_start_BxL,
    group_end=group_start_BxL + seen_BxL,
    window_start=jnp.where(
      after_sinks_BxL, documents.start + sinks + seen_BxL * size, window_end_BxL
    ),
    window_end=window_end_BxL,
  )
  return jax.tree.map(lambda x_BxL: x_BxL[:, None], bounds_BxL)


def streaming_focal_start(documents: Documents, config: DGAConfig) -> Int[Array, "B L"]:
  """Where the focal tokens of each token's document begin in the row's list of them."""
  blocks = StreamingBlocks.of(documents, config)
  sinks_BxL = jnp.minimum(documents.length, config.sink_tokens)
  focal_BxL = documents.is_last * (sinks_BxL + config.focal_in_block * blocks.count)
  return _at_start(count_before(focal_BxL), documents)


@dataclasses.dataclass(frozen=True)
class StreamingBlocks:
  """Which streaming block each token lies in."""

  sink: Bool[Array, "B L"]
  index: Int[Array, "B L"]  # ordinal in the document, 0 for sinks and padding
  offset: Int[Array, "B L"]  # place in the block
  count: Int[Array, "B L"]  # complete blocks of the document
  complete: Bool[Array, "B L"]  # whether the token's block is complete

  @classmethod
  def of(cls, documents: Documents, config: DGAConfig) -> "StreamingBlocks":
    """Cuts each document, after its sinks, into blocks of m + f tokens."""
    after_BxL = documents.position - config.sink_tokens
    in_block_BxL = documents.is_token & (after_BxL >= 0)
    index_BxL = jnp.where(in_block_BxL, after_BxL // config.block_size, 0)
    count_BxL = jnp.maximum(documents.length - config.sink_tokens, 0) // config.block_size
    return cls(
      sink=documents.is_token & (after_BxL < 0),
      index=index_BxL,
      offset=after_BxL % config.block_size,
      count=count_BxL,
      complete=in_block_BxL & (index_BxL < count_BxL),
    )

  def starts(self, blocks: int) -> Int[Array, "B k"]:
    """Position of each complete block's first token, in order; L where there is none."""
    first_BxL = self.complete & (self.offset == 0)
    return compact_indices(count_before(first_BxL), first_BxL, blocks)


def count_before(x: Array) -> Array:
  """Exclusive cumulative sum along the row."""
  x = x.astype(jnp.int32)
  return jnp.cumsum(x, axis=-1) - x


def _at_start(count_before: Array, documents: Documents) -> Array:
  """A `_count_before` at the first token of each token's document; padding keeps its own."""
  if documents.whole_rows:
    return jnp.zeros_like(count_before)
  start = documents.start if count_before.ndim == 2 else documents.start[:, None]
  return jnp.take_along_axis(count_before, start, axis=-1)
