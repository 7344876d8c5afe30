"""One decoding step over the compact cache, in place."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dga_jax.attention.attend import merge_scale
from dga_jax.cache.state import CompactCache
from dga_jax.cache.summary import merge_blocks
from dga_jax.config import DGAConfig
from pallas_kernels.decode import (
  BlockRule,
  CacheArrays,
  CacheLengths,
  CacheMask,
  decode_attention,
  GroupBias,
  has_step_kernel,
  step_in_place,
)


def decode_step(
  query_BxHxD: Float[Array, "B H D"],
  key_BxNxD: Float[Array, "B N D"],
  value_BxNxD: Float[Array, "B N D"],
  cache: CompactCache,
  layer: Int[Array, ""] | int,
  config: DGAConfig,
  *,
  scale: float | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, "B H D"], CompactCache]:
  """Appends one token to every sequence, attends, and flushes the blocks that it completes.

  Each sequence flushes at its own time; shapes are static. Tokens beyond the `max_length` that
  the cache was made for cannot raise under jit: their summaries are dropped.

  Args:
    cache: of all layers, stacked on a leading axis, so that a token is written in place where
      taking a layer out and putting it back would copy it.
    layer: which of them.
    scale: of the attention logits, default 1/√D.
    implementation: see `pallas_kernels.decode`; "triton" is a kernel that does the whole step.
  """
  scale = query_BxHxD.shape[-1] ** -0.5 if scale is None else scale
  token = (query_BxHxD, key_BxNxD, value_BxNxD)
  store, blocks = _store(cache), _blocks(config, query_BxHxD.shape[-1])
  if has_step_kernel(query_BxHxD, store, blocks, implementation):
    progress = CacheLengths(cache.length, cache.origin, cache.prefix, cache.prefix_focal)
    bias = _bias_amount(config)
    out_BxHxD, store, length = step_in_place(
      *token, store, progress, layer, blocks=blocks, scale=scale, group_bias=bias
    )
    return out_BxHxD, dataclasses.replace(cache, length=length, **store._asdict())
  place = _Place.of(cache, layer, config)
  cache = _append(key_BxNxD, value_BxNxD, cache, layer, place)
  compact_key, compact_value, raw_key, raw_value, read_layer = _readable(cache, layer)
  out_BxHxD = decode_attention(
    query_BxHxD,
    compact_key,
    compact_value,
    raw_key,
    raw_value,
    read_layer,
    _visible(cache, layer, place, config),
    scale=scale,
    group_bias=_group_bias(cache, layer, config),
    implementation=implementation,
  )
  # Reading comes before the flush. Where XLA does not know that, it copies all layers' entries.
  out_BxHxD, cache = jax.lax.optimization_barrier((out_BxHxD, cache))
  return out_BxHxD, _flush(query_BxHxD, cache, layer, place, config)


def _store(cache: CompactCache) -> CacheArrays:
  return CacheArrays(
    cache.compact_key,
    cache.compact_value,
    cache.raw_key,
    cache.raw_value,
    cache.key_scale,
    cache.value_scale,
  )


def _blocks(config: DGAConfig, head_dim: int) -> BlockRule:
  return BlockRule(
    members=config.group_size,
    focal=config.focal_in_block,
    window=config.local_window,
    choice_scale=head_dim**-0.5,
    merge_scale=merge_scale(config, head_dim),
  )


class _Place(NamedTuple):
  """Where the token that is being decoded stands."""

  in_prefix: Bool[Array, "B"]
  position: Int[Array, "B"]
  block: Int[Array, "B"]
  offset: Int[Array, "B"]
  slot: Int[Array, "B"]  # in the raw ring

  @classmethod
  def of(cls, cache: CompactCache, layer: Array | int, config: DGAConfig) -> "_Place":
    position_B = cache.length[layer]
    after_B = position_B - cache.origin[layer]
    block_B, offset_B = after_B // config.block_size, after_B % config.block_size
    ring_B = block_B % (config.local_window + 1)
    return cls(
      in_prefix=after_B < 0,
      position=position_B,
      block=block_B,
      offset=offset_B,
      slot=ring_B * config.block_size + offset_B,
    )


def _append(
  key_BxNxD: Array, value_BxNxD: Array, cache: CompactCache, layer: Array | int, place: _Place
) -> CompactCache:
  """Sinks go to the prefix, others to the raw ring; an index beyond the end writes nothing."""
  row_B = jnp.arange(key_BxNxD.shape[0])
  compact_B = jnp.where(place.in_prefix, place.position, cache.compact_key.shape[-2])
  raw_B = jnp.where(place.in_prefix, cache.raw_key.shape[-2], place.slot)

  def put(array: Array, token_BxNxD: Array) -> Array:
    return array.at[layer, row_B, :, raw_B].set(token_BxNxD, mode="drop")

  cache = cache.put_compact((layer, row_B, slice(None), compact_B), key_BxNxD, value_BxNxD)
  return dataclasses.replace(
    cache,
    raw_key=put(cache.raw_key, key_BxNxD),
    raw_value=put(cache.raw_value, value_BxNxD),
    length=cache.length.at[layer].add(1),
  )


def _readable(cache: CompactCache, layer: Array | int) -> tuple[Any, ...]:
  """Compact keys and values, raw ones, and the layer in them, as `decode_attention` reads them."""
  if cache.key_scale is not None:
    # It reads no 8 bits: it gets this layer alone, restored.
    cache, layer = jax.tree.map(lambda x: x[layer][None], cache), 0
  return *cache.compact, cache.raw_key, cache.raw_value, layer


def _visible(
  cache: CompactCache, layer: Array | int, place: _Place, config: DGAConfig
) -> CacheMask:
  """Compact entries of blocks before the window, and raw tokens from the window's start on.

  Of the ring's slots those behind the current token hold the oldest block, which has left the
  window, up to where the next one begins; before the ring is full they all are empty.
  """
  summarised_B = jnp.maximum(place.block - config.local_window, 0)
  full_B = ~place.in_prefix & (place.block >= config.local_window)
  written_B = jnp.where(place.in_prefix, 0, place.slot + 1)
  next_block_B = place.slot - place.offset + config.block_size
  return CacheMask(
    compact_end=jnp.where(
      place.in_prefix,
      place.position + 1,
      cache.prefix[layer] + (config.focal_in_block + 1) * summarised_B,
    ),
    raw_end=jnp.where(full_B, (config.local_window + 1) * config.block_size, written_B),
    hidden_start=written_B,
    hidden_end=jnp.where(full_B, next_block_B, written_B),
  )


def _bias_amount(config: DGAConfig) -> float:
  return math.log(config.group_size) if config.group_logit_bias == "log_size" else 0.0


def _group_bias(cache: CompactCache, layer: Array | int, config: DGAConfig) -> GroupBias | None:
  amount = _bias_amount(config)
  if not amount:
    return None
  return GroupBias(
    amount=amount,
    first=cache.prefix_focal[layer],
    prefix=cache.prefix[layer],
    period=config.focal_in_block + 1,
  )


def _flush(
  query_BxHxD: Array, cache: CompactCache, layer: Array | int, place: _Place, config: DGAConfig
) -> CompactCache:
  """Where a block is complete, its last query chooses f tokens and merges the other m."""
  B, size, f = query_BxHxD.shape[0], config.block_size, config.focal_in_block

  @jax.vmap
  def block(ring_NxWxD: Array, begin: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(ring_NxWxD, begin, size, axis=1).swapaxes(0, 1)

  key_BxsxNxD, value_BxsxNxD = (
    block(raw[layer], place.slot - place.offset) for raw in (cache.raw_key, cache.raw_value)
  )
  key_Bx1xFxNxD, value_Bx1xFxNxD = merge_blocks(
    query_BxHxD[:, None], key_BxsxNxD[:, None], value_BxsxNxD[:, None], config
  )
  full_B = ~place.in_prefix & (place.offset == size - 1)
  first_B = cache.prefix[layer] + (f + 1) * place.block
  entry_BxF = first_B[:, None] + jnp.arange(f + 1)[None]
  entry_BxF = jnp.where(full_B[:, None], entry_BxF, cache.compact_key.shape[-2])
  at = (layer, jnp.arange(B)[:, None], slice(None), entry_BxF)
  return cache.put_compact(at, key_Bx1xFxNxD[:, 0], value_Bx1xFxNxD[:, 0])
