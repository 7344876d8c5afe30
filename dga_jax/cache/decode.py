"""One decoding step over the compact cache, in place."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dga_jax.cache.state import CompactCache
from dga_jax.cache.summary import summarise_blocks
from dga_jax.config import DGAConfig
from pallas_kernels.decode import decode_attention, GroupBias, Visible


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
    implementation: of the attention; see `pallas_kernels.decode`.
  """
  place = _Place.of(cache, layer, config)
  cache = _append(key_BxNxD, value_BxNxD, cache, layer, place)
  out_BxHxD = decode_attention(
    query_BxHxD,
    cache.compact_key,
    cache.compact_value,
    cache.raw_key,
    cache.raw_value,
    layer,
    _visible(cache, layer, place, config),
    scale=query_BxHxD.shape[-1] ** -0.5 if scale is None else scale,
    group_bias=_group_bias(cache, layer, config),
    implementation=implementation,
  )
  # Reading comes before the flush. Where XLA does not know that, it copies all layers' entries.
  out_BxHxD, cache = jax.lax.optimization_barrier((out_BxHxD, cache))
  return out_BxHxD, _flush(query_BxHxD, cache, layer, place, config)


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

  def put(array: Array, slot_B: Array, token_BxNxD: Array) -> Array:
    return array.at[layer, row_B, :, slot_B].set(token_BxNxD, mode="drop")

  return dataclasses.replace(
    cache,
    compact_key=put(cache.compact_key, compact_B, key_BxNxD),
    compact_value=put(cache.compact_value, compact_B, value_BxNxD),
    raw_key=put(cache.raw_key, raw_B, key_BxNxD),
    raw_value=put(cache.raw_value, raw_B, value_BxNxD),
    length=cache.length.at[layer].add(1),
  )


def _visible(cache: CompactCache, layer: Array | int, place: _Place, config: DGAConfig) -> Visible:
  """Compact entries of blocks before the window, and raw tokens from the window's start on.

  Of the ring's slots those behind the current token hold the oldest block, which has left the
  window, up to where the next one begins; before the ring is full they all are empty.
  """
  summarised_B = jnp.maximum(place.block - config.local_window, 0)
  full_B = ~place.in_prefix & (place.block >= config.local_window)
  written_B = jnp.where(place.in_prefix, 0, place.slot + 1)
  next_block_B = place.slot - place.offset + config.block_size
  return Visible(
    compact_end=jnp.where(
      place.in_prefix,
      place.position + 1,
      cache.prefix[layer] + (config.focal_in_block + 1) * summarised_B,
    ),
    raw_end=jnp.where(full_B, (config.local_window + 1) * config.block_size, written_B),
    hidden_start=written_B,
    hidden_end=jnp.where(full_B, next_block_B, written_B),
  )


def _group_bias(cache: CompactCache, layer: Array | int, config: DGAConfig) -> GroupBias | None:
  if config.group_logit_bias != "log_size":
    return None
  return GroupBias(
    amount=math.log(config.group_size),
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
  key_Bx1xFxNxD, value_Bx1xFxNxD = summarise_blocks(
    query_BxHxD[:, None], key_BxsxNxD[:, None], value_BxsxNxD[:, None], config
  )
  full_B = ~place.in_prefix & (place.offset == size - 1)
  first_B = cache.prefix[layer] + (f + 1) * place.block
  entry_BxF = first_B[:, None] + jnp.arange(f + 1)[None]
  entry_BxF = jnp.where(full_B[:, None], entry_BxF, cache.compact_key.shape[-2])
  row_Bx1 = jnp.arange(B)[:, None]

  def store(compact: Array, new_Bx1xFxNxD: Array) -> Array:
    return compact.at[layer, row_Bx1, :, entry_BxF].set(new_Bx1xFxNxD[:, 0], mode="drop")

  return dataclasses.replace(
    cache,
    compact_key=store(cache.compact_key, key_Bx1xFxNxD),
    compact_value=store(cache.compact_value, value_Bx1xFxNxD),
  )
