"""Streaming selection on a sequence split over devices: only summaries travel to all of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from dga_jax.attention.attend import merge_scale
from dga_jax.attention.context_parallel.zigzag import ZigzagShards
from dga_jax.attention.metadata import AttentionMetadata, StreamingMetadata
from dga_jax.attention.segments import count_before
from dga_jax.attention.streaming_blocks import cache_layout, StreamingBlocks
from dga_jax.attention.visibility import focal_list_start
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
  pieces: ZigzagShards,
  *,
  implementation: Implementation,
) -> KVSources:
  """What one device's queries attend to, and the ranges that each of them sees of it.

  A block is summarised by the device that holds its last token. For that, and for the raw window,
  each chunk takes the last tokens of the chunk before it from a neighbour. The summaries of all
  blocks, f + 1 rows for m + f tokens, are gathered; in the backward pass their gradients are summed
  back to the devices that made them.

  Raises:
    ValueError: a chunk is shorter than a query's raw window.
  """
  config, streaming = metadata.config, metadata.by_selection
  assert isinstance(streaming, StreamingMetadata)
  halo = streaming_halo(config)
  if halo > pieces.chunk:
    raise ValueError(
      f"config.mesh.context={pieces.count} cuts the sequence into chunks of {pieces.chunk} tokens; "
      f"they must hold at least {halo}, a raw window without its last token. Take a smaller "
      "context or longer sequences."
    )
  before = pieces.halo_exchange(jnp.stack([key, value], axis=2), halo)
  window_key, window_value = (
    _join(jnp.concatenate([before[:, :, :, i], pieces.split(x)], axis=2))
    for i, x in enumerate((key, value))
  )
  blocks = _Blocks(streaming.blocks.start, config, pieces)
  _, made, _ = merge_blocks(
    _join(jnp.pad(pieces.split(query), ((0, 0), (0, 0), (halo, 0), (0, 0), (0, 0)))),
    window_key,
    window_value,
    blocks.own_starts(halo),
    members=config.group_size,
    focal=config.focal_in_block,
    scale=merge_scale(config, query.shape[-1]),
    implementation=implementation,
  )
  focal_key, group_key = blocks.gather(made.focal_key, made.group_key)
  focal_value, group_value = blocks.gather(made.focal_value, made.group_value)
  if config.sink_tokens:
    sinks = _Sinks(metadata, streaming.blocks, pieces)
    focal_key, focal_value = sinks.insert(key, focal_key), sinks.insert(value, focal_value)
  entries = Entries(focal_key, focal_value, group_key, group_value, window_key, window_value)
  visibility = jax.tree.map(pieces.own, streaming.visibility)
  # From positions in the sequence to places in the window list, chunks with what precedes them.
  chunk_start_P = jnp.repeat(pieces.chunk_starts, pieces.chunk)
  list_start_P = jnp.repeat(jnp.arange(2) * (halo + pieces.chunk) + halo, pieces.chunk)
  shift_1x1xP = (list_start_P - chunk_start_P)[None, None]
  visibility = visibility._replace(
    window_start=visibility.window_start + shift_1x1xP,
    window_end=visibility.window_end + shift_1x1xP,
  )
  return visibility.sources(entries)


def streaming_halo(config: DGAConfig) -> int:
  """Tokens before a chunk that its first query may see raw."""
  return cache_layout(config).raw_size - 1


class _Blocks:
  """Which blocks end in which chunk, and the way of their summaries to all devices.

  Args:
    start_Bxk: first position of every block of the sequence, in order; L for none.
    config: sizes of a block.
    pieces: the geometry.
  """

  def __init__(self, start_Bxk: Int[Array, "B k"], config: DGAConfig, pieces: ZigzagShards) -> None:
    self.start_Bxk = start_Bxk
    self._pieces = pieces
    self._size = config.block_size
    # Blocks are disjoint, and the first that ends in a chunk may begin before it.
    self._most = (pieces.chunk + config.block_size - 1) // config.block_size
    edge_2C = jnp.arange(2 * pieces.count, dtype=jnp.int32) * pieces.chunk
    ends_before = (start_Bxk + self._size - 1)[:, None] < edge_2C[None, :, None]
    self._first_Bx2C = ends_before.sum(axis=-1, dtype=jnp.int32)

  def own_starts(self, halo: int) -> Int[Array, "B 2K"]:
    """Where this device's blocks begin in its chunks, each with `halo` tokens before it.

    For each chunk there are as many as can end in one. The end of the arrays stands for none.
    """
    pieces = self._pieces
    chunk_start_1x2x1 = pieces.chunk_starts[None, :, None]
    first_Bx2 = jnp.take(self._first_Bx2C, pieces.chunk_starts // pieces.chunk, axis=1)
    block_Bx2xK = first_Bx2[:, :, None] + jnp.arange(self._most, dtype=jnp.int32)[None, None]
    start_Bx2xK = take_positions(self.start_Bxk, block_Bx2xK, fill=pieces.length)
    inside_Bx2xK = start_Bx2xK - chunk_start_1x2x1
    exists_Bx2xK = inside_Bx2xK + self._size <= pieces.chunk
    padded = halo + pieces.chunk
    place_Bx2xK = inside_Bx2xK + halo + padded * jnp.arange(2)[None, :, None]
    return _join(jnp.where(exists_Bx2xK, place_Bx2xK, 2 * padded))

  def gather(
    self, focal: Float[Array, "B fK N D"], group: Float[Array, "B K N D"]
  ) -> tuple[Float[Array, "B fk N D"], Float[Array, "B k N D"]]:
    """Focal tokens and groups of all blocks, in order, of what each device made of its own."""
    B, _, N, D = focal.shape
    slots = 2 * self._most
    # Kernels may leave rows behind the asked ones.
    group = group[:, :slots].reshape(B, 2, self._most, 1, N, D)
    f = focal.shape[1] // slots
    focal = focal[:, : slots * f].reshape(B, 2, self._most, f, N, D)
    every = self._pieces.gather(jnp.concatenate([focal, group], axis=3))
    every = every.reshape(B, -1, f + 1, N, D)

    end_Bxk = self.start_Bxk + self._size - 1
    chunk_Bxk = end_Bxk // self._pieces.chunk
    block_k = jnp.arange(end_Bxk.shape[1], dtype=jnp.int32)
    inside_Bxk = block_k[None] - take_positions(self._first_Bx2C, chunk_Bxk)
    exists_Bxk = end_Bxk < self._pieces.length
    place_Bxk = jnp.where(exists_Bxk, chunk_Bxk * self._most + inside_Bxk, every.shape[1])
    blocks = take_positions(every, place_Bxk)
    return blocks[:, :, :f].reshape(B, -1, N, D), blocks[:, :, f]


class _Sinks:
  """The first tokens of documents, which stand before their blocks' focal tokens."""

  def __init__(
    self, metadata: AttentionMetadata, blocks: StreamingBlocks, pieces: ZigzagShards
  ) -> None:
    documents, config, L = metadata.documents, metadata.config, pieces.length
    most = min(L, config.sink_tokens * metadata.max_documents)
    focal_start_BxL = focal_list_start(documents, blocks, config)
    f = config.focal_in_block
    first_slot_BxL = focal_start_BxL + config.sink_tokens + f * blocks.index
    first_slot_Bxk = take_positions(first_slot_BxL + 1, blocks.start) - 1  # -1 for no block
    slot_Bxkxf = first_slot_Bxk[..., None] + jnp.arange(f, dtype=jnp.int32)[None, None]
    slot_Bxkxf = jnp.where(first_slot_Bxk[..., None] < 0, L, slot_Bxkxf)
    self._position_BxS = compact_indices(count_before(blocks.is_sink), blocks.is_sink, most)
    sink_slot_BxS = take_positions(focal_start_BxL + documents.position - L, self._position_BxS) + L
    slot = jnp.concatenate([slot_Bxkxf.reshape(len(slot_Bxkxf), -1), sink_slot_BxS], axis=1)
    self._source_Bxr = compact_indices(slot, slot < L, metadata.sizes.focal)
    self._pieces = pieces

  def insert(
    self, x_BxPxNxD: Float[Array, "B P N D"], focal: Float[Array, "B fk N D"]
  ) -> Float[Array, "B r N D"]:
    """Blocks' focal tokens and sinks in order of position, of every device's x."""
    own = take_positions(x_BxPxNxD, self._pieces.place(self._position_BxS))
    sinks = jax.lax.psum(own, self._pieces.axis_name)
    return take_positions(jnp.concatenate([focal, sinks], axis=1), self._source_Bxr)


def _join(x: Shaped[Array, "B 2 S *T"]) -> Shaped[Array, "B rows *T"]:
  return x.reshape(x.shape[0], -1, *x.shape[3:])
