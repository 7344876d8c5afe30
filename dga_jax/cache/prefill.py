"""The cache after a prompt: one pass of the op, whose entries become the compact part."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention.aggregate import plan_and_merge, zero_padding
from dga_jax.attention.attend import attend_entries
from dga_jax.attention.plan import GroupPlan
from dga_jax.cache.state import cache_size, CompactCache, ring_age
from dga_jax.config import DGAConfig
from pallas_kernels.decode import pack_rows
from pallas_kernels.gather import take_rows
from pallas_kernels.group_merge import Entries


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
  plan, query, entries = plan_and_merge(
    query_BxLxHxD,
    key_BxLxNxD,
    value_BxLxNxD,
    config=config,
    lengths=lengths_B,
    implementation="xla" if implementation == "xla" else None,
  )
  out_BxLxHxD = attend_entries(query, entries, plan, scale=scale, implementation=implementation)
  key, value = zero_padding(plan.documents, plan.padded, key_BxLxNxD, value_BxLxNxD)
  return out_BxLxHxD, cache_prompt(key, value, plan, entries, max_length=max_length)


def cache_prompt(
  key_BxLxNxD: Float[Array, "B L N D"],
  value_BxLxNxD: Float[Array, "B L N D"],
  plan: GroupPlan,
  entries: Entries,
  *,
  max_length: int,
) -> CompactCache:
  """The cache after right-padded prompts, from their plan and entries."""
  config = plan.config
  B, L, N, _D = key_BxLxNxD.shape
  r, k = plan.focal_index.shape[-1], plan.group_query.shape[-1]
  entries = entries._replace(  # without what kernels leave behind them
    focal_key=entries.focal_key[:, :r],
    focal_value=entries.focal_value[:, :r],
    group_key=entries.group_key[:, :k],
    group_value=entries.group_value[:, :k],
  )
  ragged = plan.padded
  size = cache_size(config, max_length, prompt=L, ragged=ragged)
  length_B = plan.documents.length[:, 0]
  sinks_B = jnp.full(B, config.sink_tokens, jnp.int32)
  if config.selection == "streaming":
    compact = _interleaved(entries, config)
    origin_B = prefix_B = prefix_focal_B = sinks_B
  else:
    focal_B = plan.focal_mask.sum(axis=-1, dtype=jnp.int32)[:, 0]
    groups_B = (length_B - focal_B) // config.group_size
    compact = _joined(entries, focal_B)
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


def _interleaved(entries: Entries, config: DGAConfig) -> tuple[Array, Array]:
  """Sinks, then for every block its f focal tokens and its group."""
  f = config.focal_in_block

  def interleave(focal_BxrxNxD: Array, group_BxkxNxD: Array) -> Array:
    B, k, N, D = group_BxkxNxD.shape
    sinks = focal_BxrxNxD.shape[1] - f * k
    blocks = jnp.concatenate(
      [focal_BxrxNxD[:, sinks:].reshape(B, k, f, N, D), group_BxkxNxD[:, :, None]], axis=2
    )
    return jnp.concatenate([focal_BxrxNxD[:, :sinks], blocks.reshape(B, k * (f + 1), N, D)], axis=1)

  return (
    interleave(entries.focal_key, entries.group_key),
    interleave(entries.focal_value, entries.group_value),
  )


def _joined(entries: Entries, focal_B: Array) -> tuple[Array, Array]:
  """Each row's own focal tokens, and its groups right behind them."""
  B, r, N, _ = entries.focal_key.shape
  slot = jnp.arange(r + entries.group_key.shape[1])[None]
  source_BxS = jnp.where(slot < focal_B[:, None], slot, slot - focal_B[:, None] + r)
  source_BxNxS = jnp.broadcast_to(source_BxS[:, None], (B, N, source_BxS.shape[1]))

  def join(focal_BxrxNxD: Array, group_BxkxNxD: Array) -> Array:
    return take_rows(jnp.concatenate([focal_BxrxNxD, group_BxkxNxD], axis=1), source_BxNxS)

  return (
    join(entries.focal_key, entries.group_key),
    join(entries.focal_value, entries.group_value),
  )


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
