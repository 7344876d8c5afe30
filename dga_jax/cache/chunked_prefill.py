"""Chunked prefill: many tokens at once into a cache that may already hold some.

Serves prompts that are read in chunks, and later turns of a conversation.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dga_jax.attention.attend import attention_kwargs
from dga_jax.attention.selection import comparable_scores
from dga_jax.attention.validation import Lengths, rows, softmax_scale
from dga_jax.cache import validation
from dga_jax.cache.layout import cache_layout, CacheLayout, TokenCoords
from dga_jax.cache.prompt import ring_index
from dga_jax.cache.state import CompactCache
from dga_jax.cache.summary import block_entries
from dga_jax.config import DGAConfig
from pallas_kernels.decode import CacheLengths
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gather import take_positions
from pallas_kernels.grouped_attention import grouped_attention, KVSource, KVSources


def extend(
  query: Float[Array, "B T H D"],
  key: Float[Array, "B T N D"],
  value: Float[Array, "B T N D"],
  cache: CompactCache,
  *,
  config: DGAConfig,
  focal_scores: Float[Array, "B T N"] | None = None,
  lengths: Lengths | None = None,
  layer: Int[Array, ""] | int | None = None,
  scale: float | None = None,
  implementation: Implementation = None,
) -> tuple[Float[Array, "B T H D"], CompactCache]:
  """Appends up to T tokens to every sequence, as `decode_step` would one by one.

  The compact entries of the blocks that become complete are written first. Grouped attention then
  reads all compact entries and the raw tokens; each query sees the compact entries of the blocks
  before its window.

  Args:
    query: of the new tokens, right-padded, in the dtype of the cache.
    key: as query, with N heads; after RoPE, if the model has it.
    value: as key.
    cache: from `prefill`, `empty_cache`, `decode_step` or this function.
    config: the config that the cache was made with.
    focal_scores: of the new tokens, float32, with the selector "fitted"; else None.
    lengths: int [B], new tokens of each sequence, from 0 to T; a list works. None for T.
    layer: None for a cache of one layer; the layer to read and write of a cache with a leading axis
      of layers.
    scale: of the attention logits, default 1/√D.
    implementation: of grouped attention.

  Returns:
    The output [B, T, H, D] in the query's dtype, 0 in the padding, and the cache with the new
    tokens.

  Raises:
    ValueError: if an argument does not fit the cache, or a sequence would exceed the cache's
      max_length. Under jit lengths are unknown: the compact entries of later blocks are dropped.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  validation.new_tokens(
    query,
    key,
    value,
    cache,
    focal_scores=focal_scores,
    axes="B T H D",
    config=config,
    layer=layer,
  )
  B, T = query.shape[:2]
  lengths, _ = rows(B, T, np.full(B, T, np.int32) if lengths is None else lengths, None)
  validation.room(cache, lengths, layer=layer)
  softmax_scale(scale)
  one = cache if layer is None else jax.tree.map(lambda x: x[layer], cache)
  chunk = _Chunk.after(one.lengths, jnp.asarray(lengths), T, config)
  raw = (chunk.raw_window(one.arrays.raw_key, key), chunk.raw_window(one.arrays.raw_value, value))
  scores = None
  if focal_scores is not None and one.arrays.block_score is not None:
    scores = chunk.block_scores(one.arrays.block_score, comparable_scores(focal_scores))
  one = _store_sinks(one, key, value, chunk)
  one = _store_blocks(one, query, *raw, scores, chunk, config)
  sources = _sources(one, raw, chunk, config)
  options = attention_kwargs(query, config, scale)
  options["max_window"] = chunk.layout.raw_size
  out_BxTxHxD = grouped_attention(query, sources, implementation=implementation, **options)
  one = _store_raw(one, *raw, scores, chunk, config)
  if layer is None:
    return out_BxTxHxD, one
  return out_BxTxHxD, jax.tree.map(lambda every, new: every.at[layer].set(new), cache, one)


class _Chunk(NamedTuple):
  """The new tokens of a call, and the window of raw tokens that they see.

  The window is an array of S = W + T tokens, the tokens at positions [base, base + S). It begins w
  blocks before the block of the first new token, thus before the sequence if there are fewer.
  """

  layout: CacheLayout
  before: CacheLengths  # [B], without the new tokens
  length: Int[Array, "B"]  # with the new tokens
  first_block: Int[Array, "B"]
  base: Int[Array, "B"]
  token: TokenCoords  # [B, T], of each new token; in the padding, of the tokens that could follow
  is_token: Bool[Array, "B T"]

  @classmethod
  def after(
    cls, before: CacheLengths, count_B: Int[Array, "B"], tokens: int, config: DGAConfig
  ) -> "_Chunk":
    """The next `count_B` of at most `tokens` tokens."""
    layout = cache_layout(config)
    offset_1xT = jnp.arange(tokens, dtype=jnp.int32)[None]
    first_block_B = layout.locate(before.length, before.origin).block
    return cls(
      layout=layout,
      before=before,
      length=before.length + count_B,
      first_block=first_block_B,
      base=layout.block_start(first_block_B - layout.window, before.origin),
      token=layout.locate(before.length[:, None] + offset_1xT, before.origin[:, None]),
      is_token=offset_1xT < count_B[:, None],
    )

  def raw_window(
    self, ring_BxNxWxD: Float[Array, "B N W D"], new_BxTxNxD: Float[Array, "B T N D"]
  ) -> Float[Array, "B S N D"]:
    """The raw window, from the ring and the new tokens; zeros where neither has a token."""
    W, T = ring_BxNxWxD.shape[2], new_BxTxNxD.shape[1]
    length_Bx1, origin_Bx1 = self.before.length[:, None], self.before.origin[:, None]
    position_BxS = self.base[:, None] + jnp.arange(W + T, dtype=jnp.int32)[None]
    slot_BxS = self.layout.locate(position_BxS, origin_Bx1).slot
    index_BxS = jnp.where(position_BxS < length_Bx1, slot_BxS, W + position_BxS - length_Bx1)
    exists_BxS = (position_BxS >= origin_Bx1) & (position_BxS < self.length[:, None])
    both_BxWTxNxD = jnp.concatenate([ring_BxNxWxD.swapaxes(1, 2), new_BxTxNxD], axis=1)
    return take_positions(both_BxWTxNxD, jnp.where(exists_BxS, index_BxS, W + T))

  def block_scores(
    self, held_BxNxs: Float[Array, "B N s"], new_BxTxN: Float[Array, "B T N"]
  ) -> Float[Array, "B Z N"]:
    """Focal scores of the Z = s + T tokens from the first block on; 0 where there is no token."""
    s, T = held_BxNxs.shape[2], new_BxTxN.shape[1]
    start_Bx1 = self.layout.block_start(self.first_block, self.before.origin)[:, None]
    offset_1xZ = jnp.arange(s + T, dtype=jnp.int32)[None]
    new_BxZ = start_Bx1 + offset_1xZ - self.before.length[:, None]
    index_BxZ = jnp.where(new_BxZ < 0, offset_1xZ, s + new_BxZ)
    is_token_BxZ = start_Bx1 + offset_1xZ < self.length[:, None]
    both_BxsTxN = jnp.concatenate([held_BxNxs.swapaxes(1, 2), new_BxTxN], axis=1)
    return take_positions(both_BxsTxN, jnp.where(is_token_BxZ, index_BxZ, s + T))


def _store_sinks(
  cache: CompactCache, key_BxTxNxD: Array, value_BxTxNxD: Array, chunk: _Chunk
) -> CompactCache:
  """Writes the new tokens of the prefix."""
  in_prefix_BxT = chunk.is_token & ~chunk.token.in_block
  return _put_entries(cache, chunk.token.position, in_prefix_BxT, key_BxTxNxD, value_BxTxNxD)


def _store_blocks(
  cache: CompactCache,
  query_BxTxHxD: Array,
  key_BxSxNxD: Array,
  value_BxSxNxD: Array,
  scores_BxZxN: Array | None,
  chunk: _Chunk,
  config: DGAConfig,
) -> CompactCache:
  """Writes the compact entries of the K blocks that may become complete."""
  layout, (B, T, _, D), N = chunk.layout, query_BxTxHxD.shape, key_BxSxNxD.shape[2]
  size, per_block = layout.block_size, layout.entries_per_block
  begin, K = layout.window * size, T // size + 1
  block_BxK = chunk.first_block[:, None] + jnp.arange(K, dtype=jnp.int32)[None]
  end_BxK = layout.block_start(block_BxK + 1, chunk.before.origin[:, None])
  is_complete_BxK = end_BxK <= chunk.length[:, None]
  last_BxK = jnp.where(is_complete_BxK, end_BxK - 1 - chunk.before.length[:, None], 0)
  query_BxKxHxD = jnp.take_along_axis(query_BxTxHxD, last_BxK[:, :, None, None], axis=1)

  def in_blocks(x_BxSxNxD: Array) -> Array:
    return x_BxSxNxD[:, begin : begin + K * size].reshape(B, K, size, N, D)

  scores_BxNxKxs = None
  if scores_BxZxN is not None:
    scores_BxNxKxs = scores_BxZxN[:, : K * size].swapaxes(1, 2).reshape(B, N, K, size)
  key_BxKxFxNxD, value_BxKxFxNxD = block_entries(
    query_BxKxHxD, in_blocks(key_BxSxNxD), in_blocks(value_BxSxNxD), config, scores_BxNxKxs
  )
  first_BxK = layout.block_entry(block_BxK, chunk.before.prefix[:, None])
  entry_BxKxF = first_BxK[..., None] + jnp.arange(per_block, dtype=jnp.int32)[None, None]
  is_complete_BxKxF = jnp.broadcast_to(is_complete_BxK[..., None], entry_BxKxF.shape)
  flat = (B, K * per_block)
  return _put_entries(
    cache,
    entry_BxKxF.reshape(flat),
    is_complete_BxKxF.reshape(flat),
    key_BxKxFxNxD.reshape(*flat, N, D),
    value_BxKxFxNxD.reshape(*flat, N, D),
  )


def _put_entries(
  cache: CompactCache, entry_BxE: Array, keep_BxE: Array, key_BxExNxD: Array, value_BxExNxD: Array
) -> CompactCache:
  """Writes some of E rows to their compact entries; entries beyond the end are dropped."""
  B, _, C, _ = cache.arrays.compact_key.shape
  at = (jnp.arange(B, dtype=jnp.int32)[:, None], slice(None), jnp.where(keep_BxE, entry_BxE, C))
  return cache.write_compact(at, key_BxExNxD, value_BxExNxD)


type _KeyValue = tuple[Array, Array]


def _sources(cache: CompactCache, raw: _KeyValue, chunk: _Chunk, config: DGAConfig) -> KVSources:
  """Focal tokens, groups and the raw window, each with the range that a new query sees.

  Without a bias on groups, all compact entries are read as one list of focal tokens.
  """
  layout, token = chunk.layout, chunk.token
  origin_Bx1, prefix_Bx1, prefix_focal_Bx1 = (x[:, None] for x in chunk.before[1:])
  key_BxNxCxD, value_BxNxCxD = cache.arrays.compact
  compact = (key_BxNxCxD.swapaxes(1, 2), value_BxNxCxD.swapaxes(1, 2))
  if config.group_logit_bias == "none":
    focal, group = compact, (compact[0][:, :0], compact[1][:, :0])
    focal_end_BxT = layout.visible(token, prefix_Bx1).compact_end
    group_end_BxT = jnp.zeros_like(focal_end_BxT)
  else:
    focal, group = _split(compact, layout, prefix_Bx1, prefix_focal_Bx1)
    focal_end_BxT = layout.focal_end(token, prefix_focal_Bx1)
    group_end_BxT = layout.group_end(token, prefix_Bx1 - prefix_focal_Bx1)
  start_BxT = layout.raw_start(token, origin_Bx1) - chunk.base[:, None]
  end_BxT = jnp.where(token.in_block, token.position + 1 - chunk.base[:, None], start_BxT)

  def of_tokens(start_BxT: Array, end_BxT: Array) -> tuple[Array, Array]:
    """With the axis of heads; padding sees nothing."""
    start_BxT = jnp.where(chunk.is_token, start_BxT, end_BxT)
    return start_BxT[:, None], end_BxT[:, None]

  zero_BxT = jnp.zeros_like(end_BxT)
  return KVSources(
    focal=KVSource(*focal, *of_tokens(zero_BxT, focal_end_BxT)),
    group=KVSource(*group, *of_tokens(zero_BxT, group_end_BxT)),
    window=KVSource(*raw, *of_tokens(start_BxT, end_BxT)),
  )


def _split(
  compact: _KeyValue, layout: CacheLayout, prefix_Bx1: Array, prefix_focal_Bx1: Array
) -> tuple[_KeyValue, _KeyValue]:
  """The focal tokens and the groups among the compact entries, each in order."""
  B, C, *_ = compact[0].shape
  index_BxC = jnp.broadcast_to(jnp.arange(C, dtype=jnp.int32)[None], (B, C))

  def take(entry_BxC: Array) -> _KeyValue:
    return take_positions(compact[0], entry_BxC), take_positions(compact[1], entry_BxC)

  focal = take(layout.focal_entry(index_BxC, prefix_Bx1, prefix_focal_Bx1))
  return focal, take(layout.group_entry(index_BxC, prefix_Bx1, prefix_focal_Bx1))


def _store_raw(
  cache: CompactCache,
  key_BxSxNxD: Array,
  value_BxSxNxD: Array,
  scores_BxZxN: Array | None,
  chunk: _Chunk,
  config: DGAConfig,
) -> CompactCache:
  """Fills the ring with the last w + 1 blocks, and counts the new tokens.

  The scores of the unfinished block stay.
  """
  lengths = cache.lengths._replace(length=chunk.length)
  none = jnp.iinfo(jnp.int32).max // 2
  index_BxW = ring_index(lengths, config, none=none) - chunk.base[:, None]
  arrays = cache.arrays._replace(
    raw_key=take_positions(key_BxSxNxD, index_BxW).swapaxes(1, 2),
    raw_value=take_positions(value_BxSxNxD, index_BxW).swapaxes(1, 2),
  )
  if scores_BxZxN is not None:
    size, block_B = chunk.layout.block_size, chunk.layout.locate(chunk.length, lengths.origin).block
    begin_Bx1 = size * (block_B - chunk.first_block)[:, None]
    scores_BxsxN = take_positions(scores_BxZxN, begin_Bx1 + jnp.arange(size, dtype=jnp.int32)[None])
    arrays = arrays._replace(block_score=scores_BxsxN.swapaxes(1, 2))
  return dataclasses.replace(cache, arrays=arrays, lengths=lengths)
