"""Visibility: one range of each key/value source per query, in place of an L×L mask."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from dga_jax.attention.layout import ListPositions
from dga_jax.attention.segments import at_document_start, count_before, Documents
from dga_jax.attention.selection import Selection
from dga_jax.attention.streaming_blocks import cache_layout, StreamingBlocks
from dga_jax.config import DGAConfig
from pallas_kernels.gather import take_rows
from pallas_kernels.group_merge import Entries
from pallas_kernels.grouped_attention import KVSource, KVSources


class Visibility(NamedTuple):
  """The range [start, end) that each query sees of the focal tokens, the groups and the window.

  n is the number of KV heads, or 1 where all heads see the same. Every range is non-decreasing
  along L. A query whose three ranges are empty (padding) attends to nothing.

  Attributes:
    group_order: the groups in the order that group ranges count in, for ranges over a list that
      repeats groups (bidirectional.py); None for the groups as they are.
  """

  focal_start: Int32[Array, "B n L"]
  focal_end: Int32[Array, "B n L"]
  group_start: Int32[Array, "B n L"]
  group_end: Int32[Array, "B n L"]
  window_start: Int32[Array, "B n L"]
  window_end: Int32[Array, "B n L"]
  group_order: Int32[Array, "B N S"] | None = None

  @property
  def ranges(self) -> tuple[tuple[Array, Array], tuple[Array, Array], tuple[Array, Array]]:
    """Start and end of the focal tokens, of the groups and of the window."""
    return (
      (self.focal_start, self.focal_end),
      (self.group_start, self.group_end),
      (self.window_start, self.window_end),
    )

  def sources(self, entries: Entries) -> KVSources:
    """The sources of `grouped_attention`: these ranges of the given keys and values."""
    group_key, group_value = entries.group_key, entries.group_value
    if self.group_order is not None:
      group_key, group_value = (take_rows(x, self.group_order) for x in (group_key, group_value))
    return KVSources(
      focal=KVSource(entries.focal_key, entries.focal_value, self.focal_start, self.focal_end),
      group=KVSource(group_key, group_value, self.group_start, self.group_end),
      window=KVSource(entries.window_key, entries.window_value, self.window_start, self.window_end),
    )


def global_visibility(
  selection: Selection, positions: ListPositions, documents: Documents, config: DGAConfig
) -> Visibility:
  """Global and random selection; the window source is the list of members.

  With c the number of the document's non-focal tokens at positions ≤ i ("exclusive" visibility:
  < i), query i sees the document's focal tokens j ≤ i, its first ⌊c/m⌋ groups, and members from
  slot m·⌊c/m⌋ of the document up to itself.
  """
  m = config.group_size
  upto_BxNxL = positions.members_before + positions.is_member.astype(jnp.int32)
  inclusive = config.visibility == "inclusive"
  groups_BxNxL = (upto_BxNxL if inclusive else positions.members_before) // m
  window_end_BxNxL = positions.section + upto_BxNxL
  window_start_BxNxL = positions.section + groups_BxNxL * m
  return Visibility(
    focal_start=at_document_start(positions.focal_before, documents),
    focal_end=positions.focal_before + selection.focal_mask.astype(jnp.int32),
    group_start=positions.section // m,
    group_end=positions.section // m + groups_BxNxL,
    window_start=window_start_BxNxL if config.complementary else window_end_BxNxL,
    window_end=window_end_BxNxL,
  )


def streaming_visibility(
  documents: Documents, blocks: StreamingBlocks, config: DGAConfig
) -> Visibility:
  """Streaming selection; the window source is the row itself. Independent of the selection.

  Query i of block b sees its document's sinks, the f focal tokens and the group of every block
  before b − w, and the raw tokens from block b − w up to itself. A sink sees the sinks up to
  itself.
  """
  layout, sinks = cache_layout(config), config.sink_tokens
  focal_start_BxL = focal_list_start(documents, blocks, config)
  group_start_BxL = at_document_start(
    count_before(jnp.where(documents.is_last, blocks.count, 0)), documents
  )
  seen_BxL = layout.compact_blocks(blocks.index)
  i_BxL = documents.start + documents.position
  after_sinks_BxL = documents.is_token & ~blocks.is_sink
  window_end_BxL = i_BxL + documents.is_token.astype(jnp.int32)
  visibility_BxL = Visibility(
    focal_start=focal_start_BxL,
    focal_end=focal_start_BxL
    + jnp.where(
      after_sinks_BxL,
      sinks + layout.focal * seen_BxL,
      jnp.where(blocks.is_sink, documents.position + 1, 0),
    ),
    group_start=group_start_BxL,
    group_end=group_start_BxL + seen_BxL,
    window_start=jnp.where(
      after_sinks_BxL, layout.block_start(seen_BxL, documents.start + sinks), window_end_BxL
    ),
    window_end=window_end_BxL,
  )
  return jax.tree.map(lambda x_BxL: x_BxL[:, None], visibility_BxL)


def focal_list_start(
  documents: Documents, blocks: StreamingBlocks, config: DGAConfig
) -> Int32[Array, "B L"]:
  """Index, in the row's list of focal tokens, of the first one of each token's document."""
  sinks_BxL = jnp.minimum(documents.length, config.sink_tokens)
  focal_BxL = jnp.where(documents.is_last, sinks_BxL + config.focal_in_block * blocks.count, 0)
  return at_document_start(count_before(focal_BxL), documents)
