"""Prefill: the compact cache after right-padded prompts, and their attention."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention.attend import attend_prepared, merge_tokens, zero_padding
from dga_jax.attention.metadata import (
  AttentionMetadata,
  prepare,
  RankingMetadata,
  StreamingMetadata,
)
from dga_jax.attention.segments import find_documents
from dga_jax.attention.selection import comparable_scores
from dga_jax.attention.validation import focal_scores as validate_scores
from dga_jax.attention.validation import (
  is_causal,
  Lengths,
  query_and_key,
  rows,
  softmax_scale,
  value_like_key,
)
from dga_jax.cache import validation
from dga_jax.cache.layout import cache_layout, cache_size, CacheSettings
from dga_jax.cache.state import CompactCache, lengths_with_sinks
from dga_jax.config import DGAConfig
from pallas_kernels.decode import CacheArrays, CacheLengths, pack_rows
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gather import take_positions, take_rows
from pallas_kernels.grouped_attention import KVSources


def prefill(
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  query: Float[Array, "B L H D"],
  *,
  config: DGAConfig,
  max_length: int,
  focal_scores: Float[Array, "B L N"] | None = None,
  lengths: Lengths | None = None,
  implementation: Implementation = None,
) -> CompactCache:
  """The cache of one layer after right-padded prompts.

  Under streaming selection the cache is the one that decoding the prompt token by token leaves.
  Under global and random selection the prompt is ranked as a whole; its focal tokens and groups
  become the prefix. The queries serve to choose focal tokens and to merge groups. The
  output of attention comes from `dga_jax.dynamic_group_attention`, or together with the cache from
  `attend_and_prefill`, which plans and merges once for both.

  Args:
    key: any float dtype, the dtype of all arrays; after RoPE, if the model has it.
    value: as key.
    query: N KV heads divide its H heads; query head h belongs to KV head ⌊h / (H/N)⌋.
    config: the same config must be passed to every later call with this cache.
    max_length: tokens that the cache holds for a sequence, prompt included; at least L.
    focal_scores: of the prompts' tokens, float32, with the selector "fitted"; else None.
    lengths: int [B], tokens of each prompt, the rest being right padding; a list works. None where
      every prompt has L tokens, and the cache then has its exact size, see `cache_size`.
    implementation: "xla" merges in XLA; None or another name takes the first backend that can.

  Returns:
    The cache, to be passed to `decode_step` or `extend`.

  Raises:
    ValueError: names the argument that does not fit and what it must be.
  """
  metadata = _prepared(query, key, value, focal_scores, config, max_length, lengths)
  merged = merge_tokens(
    query, key, value, metadata, focal_scores=focal_scores, implementation=implementation
  )
  return cache_prompt(key, value, focal_scores, metadata, merged.sources, max_length)


def attend_and_prefill(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  *,
  config: DGAConfig,
  max_length: int,
  focal_scores: Float[Array, "B L N"] | None = None,
  lengths: Lengths | None = None,
  scale: float | None = None,
  implementation: Implementation = None,
) -> tuple[Float[Array, "B L H D"], CompactCache]:
  """Attention over right-padded prompts, and the cache after them.

  Computes `dga_jax.dynamic_group_attention` and `prefill` from one plan.

  Args:
    query: see `prefill`, as key, value, config, max_length, focal_scores and lengths.
    scale: of the attention logits, default 1/√D.
    implementation: of attention; "xla" also merges in XLA.

  Returns:
    The output [B, L, H, D] in the query's dtype, 0 in the padding, and the cache.

  Raises:
    ValueError: names the argument that does not fit and what it must be.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  metadata = _prepared(query, key, value, focal_scores, config, max_length, lengths)
  softmax_scale(scale)
  return attend_and_prefill_prepared(
    query,
    key,
    value,
    metadata,
    max_length=max_length,
    focal_scores=focal_scores,
    scale=scale,
    implementation=implementation,
  )


def attend_and_prefill_prepared(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  metadata: AttentionMetadata,
  *,
  max_length: int,
  focal_scores: Float[Array, "B L N"] | None = None,
  scale: float | None = None,
  implementation: Implementation = None,
) -> tuple[Float[Array, "B L H D"], CompactCache]:
  """As `attend_and_prefill`, with the metadata that all layers of a forward share.

  Args:
    query: see `attend_and_prefill`, as all but the metadata.
    metadata: from `dga_jax.attention.metadata.prepare`, of rows without segment ids.
  """
  merged = merge_tokens(
    query, key, value, metadata, focal_scores=focal_scores, implementation=implementation
  )
  out = attend_prepared(merged, metadata, scale=scale, implementation=implementation)
  return out, cache_prompt(key, value, focal_scores, metadata, merged.sources, max_length)


def _prepared(
  query: Array,
  key: Array,
  value: Array,
  focal_scores: Array | None,
  config: DGAConfig,
  max_length: int,
  lengths: Lengths | None,
) -> AttentionMetadata:
  """The checked arguments' metadata."""
  query_and_key(query, key)
  value_like_key(value, key)
  validate_scores(focal_scores, key, config)
  is_causal(config, "a cache")
  batch, length = key.shape[:2]
  validation.prompt_fits(length, max_length)
  lengths, _ = rows(batch, length, lengths, None)
  return prepare(find_documents(batch, length, lengths, None), config)


def cache_prompt(
  key_BxLxNxD: Float[Array, "B L N D"],
  value_BxLxNxD: Float[Array, "B L N D"],
  scores_BxLxN: Float[Array, "B L N"] | None,
  metadata: AttentionMetadata,
  sources: KVSources,
  max_length: int,
) -> CompactCache:
  """The cache after prompts, from their metadata and merged tokens.

  Args:
    key_BxLxNxD: of the prompts.
    value_BxLxNxD: likewise.
    scores_BxLxN: focal scores, with the selector "fitted"; else None.
    metadata: of the prompts.
    sources: of `merge_tokens`, whose focal tokens and groups have the heads of the key.
    max_length: tokens that the cache holds for a sequence.
  """
  config, documents = metadata.config, metadata.documents
  key_BxLxNxD, value_BxLxNxD = zero_padding(documents, key_BxLxNxD, value_BxLxNxD)
  L = key_BxLxNxD.shape[1]
  size = cache_size(
    config=config, max_length=max_length, prompt=L, ragged=documents.rows != "whole"
  )
  # Without the rows of padding that kernels append.
  r, k = metadata.sizes
  focal = (sources.focal.key[:, :r], sources.focal.value[:, :r])
  group = (sources.group.key[:, :k], sources.group.value[:, :k])
  if isinstance(metadata.by_selection, StreamingMetadata):
    lengths = lengths_with_sinks(documents.row_length, config.sink_tokens)
    compact = [_interleave(*pair, config) for pair in zip(focal, group, strict=True)]
  else:
    lengths = _prompt_lengths(metadata, metadata.by_selection)
    focal_B = metadata.by_selection.quotas.quota[:, 0]
    compact = [_concatenate(*pair, focal_B) for pair in zip(focal, group, strict=True)]
  ring_BxW = ring_index(lengths, config, none=L)
  ring_BxNxW = jnp.broadcast_to(ring_BxW[:, None], (len(ring_BxW), key_BxLxNxD.shape[2], size.raw))
  stored = config.cache_dtype or key_BxLxNxD.dtype
  (compact_key, key_scale), (compact_value, value_scale) = (
    pack_rows(_heads_first(x, size.compact), stored) for x in compact
  )
  arrays = CacheArrays(
    compact_key=compact_key,
    compact_value=compact_value,
    raw_key=_heads_first(take_rows(key_BxLxNxD, ring_BxNxW), size.raw),
    raw_value=_heads_first(take_rows(value_BxLxNxD, ring_BxNxW), size.raw),
    key_scale=key_scale,
    value_scale=value_scale,
    block_score=None if scores_BxLxN is None else _unfinished(scores_BxLxN, lengths, config),
  )
  return CompactCache(arrays, lengths, max_length, CacheSettings.from_config(config))


def _unfinished(
  scores_BxLxN: Array, lengths: CacheLengths, config: DGAConfig
) -> Float[Array, "B N s"]:
  """The scores of the tokens of each row's unfinished block; 0 for tokens that do not exist."""
  layout, L = cache_layout(config), scores_BxLxN.shape[1]
  block_B = layout.locate(lengths.length, lengths.origin).block
  start_B = layout.block_start(block_B, lengths.origin)
  position_Bxs = start_B[:, None] + jnp.arange(layout.block_size, dtype=jnp.int32)[None]
  index_Bxs = jnp.where(position_Bxs < lengths.length[:, None], position_Bxs, L)
  return take_positions(comparable_scores(scores_BxLxN), index_Bxs).swapaxes(1, 2)


def _prompt_lengths(metadata: AttentionMetadata, ranking: RankingMetadata) -> CacheLengths:
  """The whole prompt is in the prefix.

  A prompt shorter than the sinks is all focal, and the next tokens complete the sinks.
  """
  config, length_B = metadata.config, metadata.documents.row_length
  focal_B = ranking.quotas.quota[:, 0]
  sinks_B = jnp.full(length_B.shape, config.sink_tokens, jnp.int32)
  groups_B = (length_B - focal_B) // config.group_size
  has_sinks_B = length_B >= sinks_B
  return CacheLengths(
    length=length_B,
    origin=jnp.maximum(length_B, sinks_B),
    prefix=jnp.where(has_sinks_B, focal_B + groups_B, sinks_B),
    prefix_focal=jnp.where(has_sinks_B, focal_B, sinks_B),
  )


def _interleave(focal_BxrxNxD: Array, group_BxkxNxD: Array, config: DGAConfig) -> Array:
  """Streaming selection: the sinks, then the f focal tokens and the group of each block."""
  f = config.focal_in_block
  B, k, N, D = group_BxkxNxD.shape
  sinks = focal_BxrxNxD.shape[1] - f * k
  blocks = jnp.concatenate(
    [focal_BxrxNxD[:, sinks:].reshape(B, k, f, N, D), group_BxkxNxD[:, :, None]], axis=2
  )
  return jnp.concatenate([focal_BxrxNxD[:, :sinks], blocks.reshape(B, k * (f + 1), N, D)], axis=1)


def _concatenate(focal_BxrxNxD: Array, group_BxkxNxD: Array, focal_B: Array) -> Array:
  """Other selections: the focal tokens of each row, then its groups, without a gap."""
  B, r, N, _ = focal_BxrxNxD.shape
  slot = jnp.arange(r + group_BxkxNxD.shape[1], dtype=jnp.int32)[None]
  source_BxS = jnp.where(slot < focal_B[:, None], slot, slot - focal_B[:, None] + r)
  source_BxNxS = jnp.broadcast_to(source_BxS[:, None], (B, N, source_BxS.shape[1]))
  return take_rows(jnp.concatenate([focal_BxrxNxD, group_BxkxNxD], axis=1), source_BxNxS)


def _heads_first(x_BxSxNxD: Array, size: int) -> Float[Array, "B N S D"]:
  """Cut or padded with zeros to `size` entries. No sequence has an entry in what is cut off."""
  x_BxNxSxD = x_BxSxNxD[:, :size].swapaxes(1, 2)
  return jnp.pad(x_BxNxSxD, ((0, 0), (0, 0), (0, size - x_BxNxSxD.shape[2]), (0, 0)))


def ring_index(lengths: CacheLengths, config: DGAConfig, *, none: int) -> Int[Array, "B W"]:
  """The position of the token in each raw slot, `none` for an empty slot."""
  layout = cache_layout(config)
  position_BxW, is_held_BxW = layout.ring_positions(
    jnp.arange(layout.raw_size, dtype=jnp.int32)[None],
    lengths.length[:, None],
    lengths.origin[:, None],
  )
  return jnp.where(is_held_BxW, position_BxW, none)
