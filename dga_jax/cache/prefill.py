"""The cache after a prompt: one pass of the op, whose entries become the compact part."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention.attend import attend_merged, merge_tokens, zero_padding
from dga_jax.attention.metadata import AttentionMetadata, prepare, StreamingMetadata
from dga_jax.attention.segments import find_documents
from dga_jax.cache.state import cache_size, CompactCache, ring_age
from dga_jax.config import DGAConfig
from pallas_kernels.decode import pack_rows
from pallas_kernels.group_merge import take_rows
from pallas_kernels.grouped_attention import KVSources


def prefill(
  query_BxLxHxD: Float[Array, "B L H D"],
  key_BxLxNxD: Float[Array, "B L N D"],
  value_BxLxNxD: Float[Array, "B L N D"],
  config: DGAConfig,
  *,
  lengths_B: Int[Array, "B"] | None,
  max_length: int,
  scale: float | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, "B L H D"], CompactCache]:
  """Attends over right-padded prompts and leaves the cache to decode from.

  Args:
    lengths_B: tokens of each prompt; None where all have L, and the cache is then exact.
    max_length: tokens that the cache is to hold for a sequence, prompt included, at least L.
  """
  B, L = key_BxLxNxD.shape[:2]
  documents = find_documents(B, L, lengths_B, None)
  return prefill_prepared(
    query_BxLxHxD,
    key_BxLxNxD,
    value_BxLxNxD,
    prepare(documents, config),
    max_length=max_length,
    scale=scale,
    implementation=implementation,
  )


def prefill_prepared(
  query_BxLxHxD: Float[Array, "B L H D"],
  key_BxLxNxD: Float[Array, "B L N D"],
  value_BxLxNxD: Float[Array, "B L N D"],
  metadata: AttentionMetadata,
  *,
  max_length: int,
  scale: float | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, "B L H D"], CompactCache]:
  """As `prefill`, for rows whose metadata all layers share."""
  merged = merge_tokens(
    query_BxLxHxD, key_BxLxNxD, value_BxLxNxD, metadata, implementation=implementation
  )
  out_BxLxHxD = attend_merged(
    merged, metadata.invalid, metadata.config, scale=scale, implementation=implementation
  )
  key, value = zero_padding(metadata.documents, key_BxLxNxD, value_BxLxNxD)
  return out_BxLxHxD, cache_prompt(key, value, metadata, merged.sources, max_length=max_length)


def cache_prompt(
  key_BxLxNxD: Float[Array, "B L N D"],
  value_BxLxNxD: Float[Array, "B L N D"],
  metadata: AttentionMetadata,
  sources: KVSources,
  *,
  max_length: int,
) -> CompactCache:
  """The cache after right-padded prompts, from their metadata and merged tokens."""
  config, documents = metadata.config, metadata.documents
  B, L, N, _D = key_BxLxNxD.shape
  r, k = metadata.sizes
  # Without the rows that kernels append.
  focal = (sources.focal.key[:, :r], sources.focal.value[:, :r])
  group = (sources.group.key[:, :k], sources.group.value[:, :k])
  size = cache_size(config, max_length, prompt=L, ragged=documents.rows != "whole")
  length_B = documents.row_length
  sinks_B = jnp.full(B, config.sink_tokens, jnp.int32)
  if isinstance(metadata.by_selection, StreamingMetadata):
    compact = [_interleaved(*pair, config) for pair in zip(focal, group, strict=True)]
    origin_B = prefix_B = prefix_focal_B = sinks_B
  else:
    focal_B = metadata.by_selection.quotas.quota[:, 0]
    groups_B = (length_B - focal_B) // config.group_size
    compact = [_joined(*pair, focal_B) for pair in zip(focal, group, strict=True)]
    # A prompt shorter than the sinks is all focal, and the next tokens complete them.
    whole_B = length_B >= sinks_B
    origin_B = jnp.maximum(length_B, sinks_B)
    prefix_B = jnp.where(whole_B, focal_B + groups_B, sinks_B)
    prefix_focal_B = jnp.where(whole_B, focal_B, sinks_B)
  ring_BxW = ring_positions(length_B, origin_B, L, config)
  ring_BxNxW = jnp.broadcast_to(ring_BxW[:, None], (B, N, size.raw))
  stored = config.cache_dtype or key_BxLxNxD.dtype
  (compact_key, key_scale), (compact_value, value_scale) = (
    pack_rows(_heads_first(x, size.compact), stored) for x in compact
  )
  return CompactCache(
    compact_key=compact_key,
    compact_value=compact_value,
    raw_key=_heads_first(take_rows(key_BxLxNxD, ring_BxNxW), size.raw),
    raw_value=_heads_first(take_rows(value_BxLxNxD, ring_BxNxW), size.raw),
    length=length_B,
    origin=origin_B,
    prefix=prefix_B,
    prefix_focal=prefix_focal_B,
    key_scale=key_scale,
    value_scale=value_scale,
  )


def _interleaved(focal_BxrxNxD: Array, group_BxkxNxD: Array, config: DGAConfig) -> Array:
  """Sinks, then for every block its f focal tokens and its group."""
  f = config.focal_in_block
  B, k, N, D = group_BxkxNxD.shape
  sinks = focal_BxrxNxD.shape[1] - f * k
  blocks = jnp.concatenate(
    [focal_BxrxNxD[:, sinks:].reshape(B, k, f, N, D), group_BxkxNxD[:, :, None]], axis=2
  )
  return jnp.concatenate([focal_BxrxNxD[:, :sinks], blocks.reshape(B, k * (f + 1), N, D)], axis=1)


def _joined(focal_BxrxNxD: Array, group_BxkxNxD: Array, focal_B: Array) -> Array:
  """Each row's own focal tokens, followed by its groups."""
  B, r, N, _ = focal_BxrxNxD.shape
  slot = jnp.arange(r + group_BxkxNxD.shape[1])[None]
  source_BxS = jnp.where(slot < focal_B[:, None], slot, slot - focal_B[:, None] + r)
  source_BxNxS = jnp.broadcast_to(source_BxS[:, None], (B, N, source_BxS.shape[1]))
  return take_rows(jnp.concatenate([focal_BxrxNxD, group_BxkxNxD], axis=1), source_BxNxS)


def _heads_first(x_BxSxNxD: Array, size: int) -> Float[Array, "B N S D"]:
  """Cut or padded with zeros to `size` entries; what is cut holds no row's entries."""
  x_BxNxSxD = x_BxSxNxD[:, :size].swapaxes(1, 2)
  return jnp.pad(x_BxNxSxD, ((0, 0), (0, 0), (0, size - x_BxNxSxD.shape[2]), (0, 0)))


def ring_positions(
  length_B: Int[Array, "B"], origin_B: Int[Array, "B"], none: int, config: DGAConfig
) -> Int[Array, "B W"]:
  """Position of the token that each raw slot holds after `length_B` tokens, or `none`."""
  block_B = (length_B - origin_B) // config.block_size
  age_BxW, place_W = ring_age(block_B, config)
  held_BxW = block_B[:, None] - age_BxW
  position_BxW = origin_B[:, None] + held_BxW * config.block_size + place_W[None]
  return jnp.where((held_BxW >= 0) & (position_BxW < length_B[:, None]), position_BxW, none)
