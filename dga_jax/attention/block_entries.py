"""Streaming selection with one source for focal tokens and groups, in the order of the blocks.

A query sees the sinks, then the focal tokens and the group of every block before its window. With
the order [sinks | f focal tokens, 1 group | f focal tokens, 1 group | ...], which the compact cache
has too, these entries are one range. A GPU kernel then visits fewer tiles: two short ranges need at
least one partial tile each. On TPUs the schedules of the kernels did not become shorter.
"""

import jax.numpy as jnp
from jaxtyping import Array

from dga_jax.attention.metadata import AttentionMetadata, StreamingMetadata
from pallas_kernels.dispatch import find_target
from pallas_kernels.grouped_attention import KVSource, KVSources


def for_kernel(query: Array, sources: KVSources, metadata: AttentionMetadata) -> KVSources:
  """The sources in the order that is fastest on the target device of a call."""
  on_gpu = find_target(query).platform == "gpu"
  return in_block_order(sources, metadata) if on_gpu else sources


def in_block_order(sources: KVSources, metadata: AttentionMetadata) -> KVSources:
  """The sources with groups among the focal tokens, or unchanged where that is not possible.

  It is possible for causal streaming selection on rows of one document whose groups have no logit
  bias, since one source has one bias.

  Args:
    sources: focal tokens and groups of all blocks, from `merge_tokens`.
    metadata: of the same rows.
  """
  config, streaming = metadata.config, metadata.by_selection
  if (
    not isinstance(streaming, StreamingMetadata)
    or not config.causal
    or metadata.documents.rows == "packed"
    or config.group_logit_bias != "none"
  ):
    return sources
  blocks, f = streaming.blocks.start.shape[1], config.focal_in_block
  sinks = metadata.sizes.focal - blocks * f

  def interleave(focal: Array, group: Array) -> Array:
    B, _, N, D = focal.shape
    of_blocks = jnp.concatenate(
      [
        focal[:, sinks : sinks + blocks * f].reshape(B, blocks, f, N, D),
        group[:, :blocks].reshape(B, blocks, 1, N, D),
      ],
      axis=2,
    )
    return jnp.concatenate([focal[:, :sinks], of_blocks.reshape(B, blocks * (f + 1), N, D)], axis=1)

  focal, group, window = sources
  # The ranges of a single document begin at 0, so their sum is the range of the joint list.
  joint = KVSource(
    interleave(focal.key, group.key),
    interleave(focal.value, group.value),
    focal.start + group.start,
    focal.end + group.end,
  )
  none = jnp.zeros_like(group.start)
  empty = KVSource(group.key[:, :0], group.value[:, :0], none, none)
  return KVSources(joint, empty, window)
