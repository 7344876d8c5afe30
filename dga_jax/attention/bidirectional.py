"""Bidirectional attention (`DGAConfig.causal=False`): layout, visibility and the order of groups.

A query's own group is the group whose span, from its first to its last member, contains the query.
A focal query between two groups has none. With its own group at index g and w = `local_window`, the
query sees all focal tokens of its document, the raw members of the groups g − w to g + w, and every
other group merged. The visible groups are the suffix after g + w and the prefix before g − w. The
kernels take one range of each source for each query, so the list of groups holds each document's
groups twice: suffix and prefix are adjacent there, and no kernel needs another rule.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from dga_jax.attention.layout import global_layout, Layout, list_positions, ListPositions, Sizes
from dga_jax.attention.segments import at_document_end, at_document_start, Documents
from dga_jax.attention.selection import Selection
from dga_jax.attention.streaming_blocks import StreamingBlocks
from dga_jax.attention.visibility import Visibility
from dga_jax.config import DGAConfig
from pallas_kernels.gather import take_positions


def keep_partial_groups(selection: Selection, documents: Documents, m: int) -> Selection:
  """Makes the members of each document's partial last group focal, so that every query sees them.

  Args:
    selection: any focal mask.
    documents: of the rows.
    m: members of a group.
  """
  positions = list_positions(selection, documents, m)
  total_BxNxL = at_document_end(positions.members_before + positions.is_member, documents)
  is_rest_BxNxL = positions.is_member & (positions.members_before >= total_BxNxL // m * m)
  return Selection(selection.focal_mask | is_rest_BxNxL)


def keep_incomplete_blocks(
  selection: Selection, documents: Documents, blocks: StreamingBlocks
) -> Selection:
  """Makes the tokens of each document's incomplete last streaming block focal."""
  is_rest_BxL = documents.is_token & ~blocks.is_complete
  return Selection(selection.focal_mask | is_rest_BxL[:, None])


def bidirectional_plan(
  selection: Selection,
  documents: Documents,
  blocks: StreamingBlocks | None,
  sizes: Sizes,
  config: DGAConfig,
) -> tuple[Layout, Visibility]:
  """Index lists and ranges of a selection without partial groups.

  The last member of a group weighs its members; under streaming selection the last query of the
  group's block does.

  Args:
    selection: which tokens are focal.
    documents: of the rows.
    blocks: of streaming selection, else None.
    sizes: static sizes of the lists.
    config: settings of the mechanism.
  """
  positions = list_positions(selection, documents, config.group_size)
  layout = global_layout(selection, positions, sizes, config)
  if blocks is not None:
    L = documents.index.shape[1]
    last_Bxk = jnp.where(blocks.start < L, blocks.start + config.block_size - 1, L)
    layout = layout._replace(
      group_query=jnp.broadcast_to(last_Bxk[:, None], layout.group_query.shape)
    )
  return layout, _visibility(selection, positions, layout, documents, config)


def _visibility(
  selection: Selection,
  positions: ListPositions,
  layout: Layout,
  documents: Documents,
  config: DGAConfig,
) -> Visibility:
  """The ranges of every query.

  With c the non-focal tokens of the document before i, and c' the number with i itself, the groups
  [⌊c/m⌋, ⌈c'/m⌉) are the own group of query i, or an empty range for a query without one.
  """
  m, w = config.group_size, config.local_window
  upto_BxNxL = positions.members_before + positions.is_member.astype(jnp.int32)
  count_BxNxL = at_document_end(upto_BxNxL, documents) // m
  raw_start_BxNxL = jnp.maximum(positions.members_before // m - w, 0)
  raw_end_BxNxL = jnp.minimum((upto_BxNxL + m - 1) // m + w, count_BxNxL)
  first_BxNxL = positions.section // m
  focal_upto_BxNxL = positions.focal_before + selection.focal_mask.astype(jnp.int32)
  window_start_BxNxL = positions.section + raw_start_BxNxL * m
  window_end_BxNxL = positions.section + raw_end_BxNxL * m
  return Visibility(
    focal_start=at_document_start(positions.focal_before, documents),
    focal_end=at_document_end(focal_upto_BxNxL, documents),
    group_start=2 * first_BxNxL + raw_end_BxNxL,
    group_end=2 * first_BxNxL + count_BxNxL + raw_start_BxNxL,
    window_start=window_start_BxNxL if config.complementary else window_end_BxNxL,
    window_end=window_end_BxNxL,
    group_order=_repeat_groups(layout, first_BxNxL, count_BxNxL),
  )


def _repeat_groups(
  layout: Layout, first_BxNxL: Int[Array, "B N L"], count_BxNxL: Int[Array, "B N L"]
) -> Int[Array, "B N 2k"]:
  """The groups of the row with those of each document repeated: g₀ g₁ g₂ g₀ g₁ g₂, and so on.

  Args:
    layout: of the row. Unused groups are last and not repeated; unused entries hold 2k.
    first_BxNxL: index in the row's groups of the first group of each token's document.
    count_BxNxL: groups of each token's document.
  """
  B, N, k = layout.group_query.shape
  last_member_BxNxk = layout.member_index[..., -1]

  def of_group(x_BxNxL: Array) -> Array:
    flat = take_positions(
      x_BxNxL.reshape(B * N, -1), last_member_BxNxk.reshape(B * N, k), fill=2 * k
    )
    return flat.reshape(B, N, k)

  group_BxNxk = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (B, N, k))
  once_BxNxk = of_group(first_BxNxL) + group_BxNxk
  twice_BxNxk = once_BxNxk + of_group(count_BxNxL)
  # One more entry takes the unused groups, so that the scatter stays inside its array.
  slot_BxNx2k = jnp.minimum(jnp.concatenate([once_BxNxk, twice_BxNxk], axis=-1), 2 * k)
  row_Bx1x1, head_1xNx1 = jnp.arange(B)[:, None, None], jnp.arange(N)[None, :, None]
  order = jnp.full((B, N, 2 * k + 1), 2 * k, jnp.int32)
  order = order.at[row_Bx1x1, head_1xNx1, slot_BxNx2k].set(
    jnp.concatenate([group_BxNxk, group_BxNxk], axis=-1), mode="promise_in_bounds"
  )
  return order[..., : 2 * k]
