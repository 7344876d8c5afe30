"""Streaming selection on a sequence split over devices: only block summaries go to all devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from dga_jax.attention.attend import merge_scale
from dga_jax.attention.context_parallel.zigzag import ZigzagShards
from dga_jax.attention.metadata import AttentionMetadata, StreamingMetadata
from dga_jax.attention.segments import count_before
from dga_jax.attention.selection import comparable_scores
from dga_jax.attention.streaming_blocks import cache_layout, StreamingBlocks
from dga_jax.attention.visibility import focal_list_start, Visibility
from dga_jax.config import DGAConfig
from pallas_kernels.compact_indices import compact_indices
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gather import take_positions
from pallas_kernels.group_merge import Entries, merge_blocks
from pallas_kernels.grouped_attention import KVSources


def streaming_sources(
  query: Float[Array, "B P H D"],
  key: Float[Array, "B P N D"],
  value: Float[Array, "B P N D"],
  metadata: AttentionMetadata,
  shards: ZigzagShards,
  *,
  focal_scores: Float[Array, "B P N"] | None,
  implementation: Implementation,
) -> KVSources:
  """The keys and values that this device's queries attend to, and the range that each query sees.

  The device that holds the last token of a block summarizes the block. For this, and for the raw
  window, each chunk gets the last tokens of the chunk before it (halo exchange). The summaries of
  all blocks, f + 1 rows for m + f tokens, are gathered. The backward pass sums their gradients on
  the devices that made them.

  Args:
    query: the tokens of this device.
    key: the tokens of this device.
    value: the tokens of this device.
    metadata: of the whole sequence.
    shards: the tokens that each device holds.
    focal_scores: of the tokens of this device, with the selector "fitted"; else None.
    implementation: of the merge.

  Raises:
    ValueError: a chunk is shorter than the raw window of a query.
  """
  config, streaming = metadata.config, metadata.by_selection
  assert isinstance(streaming, StreamingMetadata)
  assert streaming.visibility is not None  # `attend_sharded` refuses bidirectional attention.
  halo = streaming_halo(config)
  if halo > shards.chunk:
    raise ValueError(
      f"The mesh axis {shards.axis_name!r} of size {shards.devices} cuts the sequence into chunks "
      f"of {shards.chunk} tokens. A chunk must hold the raw window of a query without its last "
      f"token, at least {halo} tokens. Use fewer devices for a sequence, or longer sequences."
    )
  before = shards.halo_exchange(jnp.stack([key, value], axis=2), halo)
  window_key, window_value = (
    join_chunks(jnp.concatenate([before[:, :, :, i], shards.split_chunks(x)], axis=2))
    for i, x in enumerate((key, value))
  )
  scores = None
  if focal_scores is not None:
    own = comparable_scores(focal_scores)
    scores = join_chunks(
      jnp.concatenate([shards.halo_exchange(own, halo), shards.split_chunks(own)], axis=2)
    )
  blocks = _ShardedBlocks(streaming.blocks.start, config, shards)
  query_chunks = shards.split_chunks(query)
  _, merged, _ = merge_blocks(
    join_chunks(jnp.pad(query_chunks, ((0, 0), (0, 0), (halo, 0), (0, 0), (0, 0)))),
    window_key,
    window_value,
    blocks.local_starts(halo),
    scores,
    members=config.group_size,
    focal=config.focal_in_block,
    scale=merge_scale(config, query.shape[-1]),
    implementation=implementation,
  )
  focal_key, group_key = blocks.all_gather(merged.focal_key, merged.group_key)
  focal_value, group_value = blocks.all_gather(merged.focal_value, merged.group_value)
  if config.sink_tokens:
    sinks = _ShardedSinks(metadata, streaming.blocks, shards)
    focal_key, focal_value = sinks.insert(key, focal_key), sinks.insert(value, focal_value)
  entries = Entries(focal_key, focal_value, group_key, group_value, window_key, window_value)
  return local_visibility(streaming.visibility, halo, shards).sources(entries)


def streaming_halo(config: DGAConfig) -> int:
  """Tokens before a chunk that the first query of the chunk may see raw."""
  return cache_layout(config).raw_size - 1


def local_visibility(visibility: Visibility, halo: int, shards: ZigzagShards) -> Visibility:
  """The ranges of this device's queries; windows are ranges of its chunks, each after its halo."""
  visibility = jax.tree.map(shards.local_part, visibility)
  chunk_start_P = jnp.repeat(shards.chunk_starts, shards.chunk)
  list_start_P = jnp.repeat(jnp.arange(2) * (halo + shards.chunk) + halo, shards.chunk)
  shift_1x1xP = (list_start_P - chunk_start_P)[None, None]
  return visibility._replace(
    window_start=visibility.window_start + shift_1x1xP,
    window_end=visibility.window_end + shift_1x1xP,
  )


class _ShardedBlocks:
  """The blocks that end in each chunk, and the all-gather of their summaries.

  Args:
    start_Bxk: first position of every block of the sequence, in order; L for an absent block.
    config: sizes of a block.
    shards: the tokens that each device holds.
  """

  def __init__(self, start_Bxk: Int[Array, "B k"], config: DGAConfig, shards: ZigzagShards) -> None:
    self._start_Bxk = start_Bxk
    self._shards = shards
    self._size = config.block_size
    # Static bound on the blocks that end in a chunk. Blocks are disjoint, and the first of them may
    # begin before the chunk.
    self._most = (shards.chunk + config.block_size - 1) // config.block_size
    edge_2C = jnp.arange(2 * shards.devices, dtype=jnp.int32) * shards.chunk
    ends_before = (start_Bxk + self._size - 1)[:, None] < edge_2C[None, :, None]
    self._first_Bx2C = ends_before.sum(axis=-1, dtype=jnp.int32)

  def local_starts(self, halo: int) -> Int[Array, "B blocks"]:
    """First index of each block of this device in its two chunks, each of which follows its halo.

    A chunk has entries for the most blocks that can end in it. The length of the chunks and
    halos marks an absent block.
    """
    shards = self._shards
    first_Bx2 = jnp.take(self._first_Bx2C, shards.chunk_ids, axis=1)
    block_Bx2xK = first_Bx2[:, :, None] + jnp.arange(self._most, dtype=jnp.int32)[None, None]
    start_Bx2xK = take_positions(self._start_Bxk, block_Bx2xK, fill=shards.length)
    offset_Bx2xK = start_Bx2xK - shards.chunk_starts[None, :, None]
    exists_Bx2xK = offset_Bx2xK + self._size <= shards.chunk
    padded = halo + shards.chunk
    index_Bx2xK = offset_Bx2xK + halo + padded * jnp.arange(2)[None, :, None]
    return join_chunks(jnp.where(exists_Bx2xK, index_Bx2xK, 2 * padded))

  def all_gather(
    self, focal: Float[Array, "B f N D"], group: Float[Array, "B g N D"]
  ) -> tuple[Float[Array, "B r N D"], Float[Array, "B k N D"]]:
    """The focal tokens and groups of all blocks, in order, from those of each device.

    Kernels may append zero rows to a device's arrays.
    """
    B, _, N, D = focal.shape
    slots = 2 * self._most
    group = group[:, :slots].reshape(B, 2, self._most, 1, N, D)
    f = focal.shape[1] // slots
    focal = focal[:, : slots * f].reshape(B, 2, self._most, f, N, D)
    gathered = self._shards.all_gather(jnp.concatenate([focal, group], axis=3))
    gathered = gathered.reshape(B, -1, f + 1, N, D)

    end_Bxk = self._start_Bxk + self._size - 1
    chunk_Bxk = end_Bxk // self._shards.chunk
    block_k = jnp.arange(end_Bxk.shape[1], dtype=jnp.int32)
    rank_Bxk = block_k[None] - take_positions(self._first_Bx2C, chunk_Bxk)
    exists_Bxk = end_Bxk < self._shards.length
    slot_Bxk = jnp.where(exists_Bxk, chunk_Bxk * self._most + rank_Bxk, gathered.shape[1])
    blocks = take_positions(gathered, slot_Bxk)
    return blocks[:, :, :f].reshape(B, -1, N, D), blocks[:, :, f]


class _ShardedSinks:
  """The first tokens of documents, which precede the focal tokens of the documents' blocks."""

  def __init__(
    self, metadata: AttentionMetadata, blocks: StreamingBlocks, shards: ZigzagShards
  ) -> None:
    documents, config, L = metadata.documents, metadata.config, shards.length
    most = min(L, config.sink_tokens * metadata.max_documents)
    focal_start_BxL = focal_list_start(documents, blocks, config)
    f = config.focal_in_block
    first_slot_BxL = focal_start_BxL + config.sink_tokens + f * blocks.index
    first_slot_Bxk = take_positions(first_slot_BxL + 1, blocks.start) - 1  # -1: an absent block
    slot_Bxkxf = first_slot_Bxk[..., None] + jnp.arange(f, dtype=jnp.int32)[None, None]
    slot_Bxkxf = jnp.where(first_slot_Bxk[..., None] < 0, L, slot_Bxkxf)
    self._position_BxS = compact_indices(count_before(blocks.is_sink), blocks.is_sink, most)
    sink_slot_BxS = take_positions(focal_start_BxL + documents.position - L, self._position_BxS) + L
    slot = jnp.concatenate([slot_Bxkxf.reshape(len(slot_Bxkxf), -1), sink_slot_BxS], axis=1)
    self._source_Bxr = compact_indices(slot, slot < L, metadata.sizes.focal)
    self._shards = shards

  def insert(
    self, x_BxPxNxD: Float[Array, "B P N D"], focal: Float[Array, "B kf N D"]
  ) -> Float[Array, "B r N D"]:
    """The sinks and the blocks' focal tokens of all devices, in order of position.

    Args:
      x_BxPxNxD: the keys, or values, of this device.
      focal: the focal keys, or values, of all blocks.
    """
    local = take_positions(x_BxPxNxD, self._shards.local_index(self._position_BxS))
    sinks = jax.lax.psum(local, self._shards.axis_name)
    return take_positions(jnp.concatenate([focal, sinks], axis=1), self._source_Bxr)


def join_chunks(x: Shaped[Array, "B 2 S *T"]) -> Shaped[Array, "B rows *T"]:
  """One list of the tokens of a device's two chunks."""
  return x.reshape(x.shape[0], -1, *x.shape[3:])
