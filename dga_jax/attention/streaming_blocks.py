"""Streaming selection cuts each document, after its sinks, into blocks of m + f tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dga_jax.attention.segments import count_before, Documents
from dga_jax.config import DGAConfig
from pallas_kernels.compact_indices import compact_indices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamingBlocks:
  """The streaming block of every token. A pytree.

  Attributes:
    is_sink: True for the first `sink_tokens` tokens of each document.
    index: ordinal of the token's block in its document; 0 for sinks and padding.
    offset: position of the token in its block.
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


def cut_blocks(documents: Documents, max_blocks: int, config: DGAConfig) -> StreamingBlocks:
  """The blocks of every document.

  Args:
    documents: of the rows.
    max_blocks: k, static bound on the complete blocks of a row.
    config: the block's size and the number of sinks.
  """
  size = config.block_size
  after_sinks_BxL = documents.position - config.sink_tokens
  in_block_BxL = documents.is_token & (after_sinks_BxL >= 0)
  index_BxL = jnp.where(in_block_BxL, after_sinks_BxL // size, 0)
  offset_BxL = after_sinks_BxL % size
  count_BxL = jnp.maximum(documents.length - config.sink_tokens, 0) // size
  is_complete_BxL = in_block_BxL & (index_BxL < count_BxL)
  if documents.rows == "whole":
    start_k = config.sink_tokens + size * jnp.arange(max_blocks, dtype=jnp.int32)
    start_Bxk = jnp.broadcast_to(start_k, (documents.index.shape[0], max_blocks))
  else:
    is_first_BxL = is_complete_BxL & (offset_BxL == 0)
    start_Bxk = compact_indices(count_before(is_first_BxL), is_first_BxL, max_blocks)
  return StreamingBlocks(
    is_sink=documents.is_token & (after_sinks_BxL < 0),
    index=index_BxL,
    offset=offset_BxL,
    count=count_BxL,
    is_complete=is_complete_BxL,
    start=start_Bxk,
  )
