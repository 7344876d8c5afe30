"""Layout: a focal mask as index lists of static size.

Lists are in position order, so that what a query sees of each is a contiguous range. Cumulative
sums and one compaction a list replace any sort.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dga_jax.attention.segments import at_document_start, count_before, Documents
from dga_jax.attention.selection import Selection
from dga_jax.attention.streaming_blocks import StreamingBlocks
from dga_jax.config import DGAConfig
from pallas_kernels.compact_indices import compact_indices


class Layout(NamedTuple):
  """Positions in the row of focal tokens and group members. Unused entries hold L.

  Attributes:
    focal_index: positions of the focal tokens, ascending.
    member_index: positions of each group's members, ascending.
    group_query: position of the query whose attention weighs a group's members.
  """

  focal_index: Int[Array, "B N r"]
  member_index: Int[Array, "B N k m"]
  group_query: Int[Array, "B N k"]


class Sizes(NamedTuple):
  """Static sizes of a layout's lists: upper bounds over the rows of a batch."""

  focal: int
  groups: int


def static_sizes(documents: Documents, max_documents: int, config: DGAConfig) -> Sizes:
  """Upper bounds on the focal tokens and groups of a row; exact for whole rows."""
  L, m = documents.index.shape[1], config.group_size
  if config.selection == "streaming":
    sinks = min(L, config.sink_tokens)
    blocks = (L - sinks if max_documents == 1 else L) // config.block_size
    focal = sinks * max_documents + config.focal_in_block * blocks
    if not config.causal:  # The tokens of incomplete blocks are focal.
      focal += (config.block_size - 1) * max_documents
    if documents.rows == "whole" and not config.causal:
      focal = L - config.group_size * blocks
    focal = min(L, focal)
    return Sizes(focal=focal, groups=blocks)
  quotas = config.focal_quota(L)
  if documents.rows == "whole":
    return Sizes(focal=int(quotas[-1]), groups=(L - int(quotas[-1])) // m)
  if max_documents == 1:
    groups = (np.arange(L + 1) - quotas) // m
    return Sizes(focal=int(quotas.max()), groups=int(groups.max()))
  at_rate = int(config.focal_at_rate(np.array(L)))
  each = max(config.min_focal_tokens, config.sink_tokens) + m
  return Sizes(focal=min(L, at_rate + max_documents * each), groups=(L - at_rate) // m)


class ListPositions(NamedTuple):
  """Places of tokens in the lists of global and random selection.

  A document's section of the member list is padded to whole groups, so that group g consists of
  slots [g·m, (g + 1)·m).

  Attributes:
    is_member: True for non-focal tokens, which are the members of groups; False for padding.
    focal_before: focal tokens of the row before each token.
    members_before: members of the document before each token.
    slot: the token's slot in the member list.
    section: first slot of the section of the token's document.
  """

  is_member: Bool[Array, "B N L"]
  focal_before: Int[Array, "B N L"]
  members_before: Int[Array, "B N L"]
  slot: Int[Array, "B N L"]
  section: Int[Array, "B N L"]


def list_positions(selection: Selection, documents: Documents, m: int) -> ListPositions:
  """Places of tokens in the lists of focal tokens and members, for groups of m members."""
  is_member_BxNxL = documents.is_token[:, None] & ~selection.focal_mask
  focal_before_BxNxL = count_before(selection.focal_mask)
  if documents.rows == "whole":  # One cumulative sum is enough.
    members_before_BxNxL = documents.position[:, None] - focal_before_BxNxL
    return ListPositions(
      is_member=is_member_BxNxL,
      focal_before=focal_before_BxNxL,
      members_before=members_before_BxNxL,
      slot=members_before_BxNxL,
      section=jnp.zeros_like(members_before_BxNxL),
    )
  members_BxNxL = count_before(is_member_BxNxL)
  members_before_BxNxL = members_BxNxL - at_document_start(members_BxNxL, documents)
  upto_BxNxL = members_before_BxNxL + is_member_BxNxL.astype(jnp.int32)
  fill_BxNxL = jnp.where(documents.is_last[:, None], -upto_BxNxL % m, 0)
  slot_BxNxL = count_before(is_member_BxNxL.astype(jnp.int32) + fill_BxNxL)
  return ListPositions(
    is_member=is_member_BxNxL,
    focal_before=focal_before_BxNxL,
    members_before=members_before_BxNxL,
    slot=slot_BxNxL,
    section=at_document_start(slot_BxNxL, documents),
  )


def global_layout(
  selection: Selection, positions: ListPositions, sizes: Sizes, config: DGAConfig
) -> Layout:
  """Global and random selection: consecutive runs of m non-focal tokens are groups.

  The last member of a group weighs its members. A document's trailing partial group is in the
  member list, with unused entries, and is visible to no query as a group.
  """
  m = config.group_size
  member_index = compact_indices(positions.slot, positions.is_member, sizes.groups * m)
  member_index = member_index.reshape(*member_index.shape[:2], sizes.groups, m)
  return Layout(
    focal_index=compact_indices(positions.focal_before, selection.focal_mask, sizes.focal),
    member_index=member_index,
    group_query=member_index[..., -1],
  )


def streaming_layout(
  selection: Selection, blocks: StreamingBlocks, sizes: Sizes, config: DGAConfig
) -> Layout:
  """Streaming selection: each complete block is a group of m members and f focal tokens.

  The block's last query weighs its members. Sinks are focal; selected tokens of incomplete blocks
  do not count.
  """
  size = config.block_size
  focal_BxNxL = selection.focal_mask & blocks.is_complete[:, None] | blocks.is_sink[:, None]
  is_member_BxNxL = blocks.is_complete[:, None] & ~focal_BxNxL
  (B, N, L), k = focal_BxNxL.shape, sizes.groups
  member_index = compact_indices(
    count_before(is_member_BxNxL), is_member_BxNxL, k * config.group_size
  )
  group_query_Bxk = jnp.where(blocks.start < L, blocks.start + size - 1, L)
  return Layout(
    focal_index=compact_indices(count_before(focal_BxNxL), focal_BxNxL, sizes.focal),
    member_index=member_index.reshape(B, N, k, config.group_size),
    group_query=jnp.broadcast_to(group_query_Bxk[:, None], (B, N, k)),
  )
