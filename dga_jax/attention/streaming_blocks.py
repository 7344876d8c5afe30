"""Streaming selection cuts each document, after its sinks, into blocks of m + f tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dga_jax.attention.segments import count_before, Documents
from dga_jax.config import DGAConfig
from pallas_kernels.compact_indices import compact_indices
from pallas_kernels.decode.cache_layout import CacheLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamingBlocks:
  """The streaming block of every token. A pytree.

  Attributes:
    is_sink: True for the first `sink_tokens` tokens of each document.
    index: ordinal of the token's block in its document; 0 for sinks and padding.
    offset: position of the token in its block; 0 for sinks.
    count: complete blocks of the token's document.
    is_complete: whether the token's block is complete.
    start: first position of every complete block, in order; L for none.
  """

  is_sink: Bool[Array, "B L"]
  index: Int[Array, "B L"]
  offset: Int[Array, "B L"]
  count: Int[Array, "B L"]
  is_complete: Bool[Array, "B L"]
  start: Int[Array, "B k"]


def cache_layout(config: DGAConfig) -> CacheLayout:
  """The index arithmetic of the blocks, which streaming selection shares with the compact cache."""
  return CacheLayout(
    members=int(config.group_size), focal=config.focal_in_block, window=int(config.local_window)
  )


def cut_blocks(documents: Documents, max_blocks: int, config: DGAConfig) -> StreamingBlocks:
  """The blocks of every document.

  Args:
    documents: of the rows.
    max_blocks: k, static bound on the complete blocks of a row.
    config: the block's size and the number of sinks.
  """
  layout, sinks = cache_layout(config), config.sink_tokens
  token_BxL = layout.locate(documents.position, sinks)
  in_block_BxL = documents.is_token & token_BxL.in_block
  index_BxL = jnp.where(in_block_BxL, token_BxL.block, 0)
  count_BxL = layout.locate(documents.length, sinks).block
  is_complete_BxL = in_block_BxL & (index_BxL < count_BxL)
  if documents.rows == "whole":
    start_k = layout.block_start(jnp.arange(max_blocks, dtype=jnp.int32), sinks)
    start_Bxk = jnp.broadcast_to(start_k, (documents.index.shape[0], max_blocks))
  else:
    is_first_BxL = is_complete_BxL & (token_BxL.offset == 0)
    start_Bxk = compact_indices(count_before(is_first_BxL), is_first_BxL, max_blocks)
  return StreamingBlocks(
    is_sink=documents.is_token & ~token_BxL.in_block,
    index=index_BxL,
    offset=token_BxL.offset,
    count=count_BxL,
    is_complete=is_complete_BxL,
    start=start_Bxk,
  )
