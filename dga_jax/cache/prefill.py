"""The cache after a prompt: one pass of the op, whose summaries become the compact part."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention.aggregate import Summaries, summarise, take_rows
from dga_jax.attention.attend import attend_summaries, hide_padding
from dga_jax.attention.plan import GroupPlan, plan_groups
from dga_jax.cache.state import cache_size, CompactCache, ring_age
from dga_jax.config import DGAConfig


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
  plan = plan_groups(query_BxLxHxD, key_BxLxNxD, config=config, lengths=lengths_B)
  query, key, value = hide_padding(plan, query_BxLxHxD, key_BxLxNxD, value_BxLxNxD)
  summaries = summarise(query, key, value, plan)
  out_BxLxHxD = attend_summaries(query, summaries, plan, scale=scale, implementation=implementation)
  return out_BxLxHxD, cache_prompt(key, value, plan, summaries, max_length=max_length)


def cache_prompt(
  key_BxLxNxD: Float[Array, "B L N D"],
  value_BxLxNxD: Float[Array, "B L N D"],
  plan: GroupPlan,
  summaries: Summaries,
  *,
  max_length: int,
) -> CompactCache:
  """The cache after right-padded prompts, from their plan and summaries."""
  config = plan.config
  B, L, N, _D = key_BxLxNxD.shape
  ragged = plan.padded
  size = cache_size(config, max_length, prompt=L, ragged=ragged)
  length_B = plan.documents.length[:, 0]
  sinks_B = jnp.full(B, config.sink_tokens, jnp.int32)
  if config.selection == "streaming":
    compact = _interleaved(summaries, config)
    origin_B = prefix_B = prefix_focal_B = sinks_B
  else:
    focal_B = plan.focal_mask.sum(axis=-1, dtype=jnp.int32)[:, 0]
    groups_B = (length_B - focal_B) // config.group_size
    compact = _joined(summaries, focal_B)
    # A prompt shorter than the sinks is all focal, and the next tokens complete them.
    whole_B = length_B >= sinks_B
    origin_B = jnp.maximum(length_B, sinks_B)
    prefix_B = jnp.where(whole_B, focal_B + groups_B, sinks_B)
    prefix_focal_B = jnp.where(whole_B, focal_B, sinks_B)
  ring_BxW = _ring_positions(length_B, origin_B, L, config)
  ring_BxNxW = jnp.broadcast_to(ring_BxW[:, None], (B, N, size.raw))
  compact_key, compact_value = (_heads_first(x, size.compact) for x in compact)
  return CompactCache(
    compact_key=compact_key,
    compact_value=compact_value,
    raw_key=_heads_first(take_rows(key_BxLxNxD, ring_BxNxW), size.raw),
    raw_value=_heads_first(take_rows(value_BxLxNxD, ring_BxNxW), size.raw),
    length=length_B,
    origin=origin_B,
    prefix=prefix_B,
    prefix_focal=prefix_focal_B,
  )


def _interleaved(summaries: Summaries, config: DGAConfig) -> tuple[Array, Array]:
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
    interleave(summaries.focal_key, summaries.group_key),
    interleave(summaries.focal_value, summaries.group_value),
  )


def _joined(summaries: Summaries, focal_B: Array) -> tuple[Array, Array]:
  """Each row's own focal tokens, and its groups right behind them."""
  B, r, N, _ = summaries.focal_key.shape
  entries = jnp.arange(r + summaries.group_key.shape[1])[None]
  source_BxS = jnp.where(entries < focal_B[:, None], entries, entries - focal_B[:, None] + r)
  source_BxNxS = jnp.broadcast_to(source_BxS[:, None], (B, N, source_BxS.shape[1]))

  def join(focal_BxrxNxD: Array, group_BxkxNxD: Array) -> Array:
    return take_rows(jnp.concatenate([focal_BxrxNxD, group_BxkxNxD], axis=1), source_BxNxS)

  return (
    join(summaries.focal_key, summaries.group_key),
    join(summaries.focal_value, summaries.group_value),
  )


def _heads_first(x_BxSxNxD: Array, size: int) -> Float[Array, "B N S D"]:
  """Cut or padded with zeros to `size` entries; what is cut holds no row's entries."""
  x_BxNxSxD = x_BxSxNxD[:, :size].swapaxes(1, 2)
  return jnp.pad(x_BxNxSxD, ((0, 0), (0, 0), (0, size - x_BxNxSxD.shape[2]), (0, 0)))


def _ring_positions(length_B: Array, origin_B: Array, L: int, config: DGAConfig) -> Array:
  """Position of the token that each raw slot holds after the prompt; L for none."""
  block_B = (length_B - origin_B) // config.block_size
  age_BxW, place_W = ring_age(block_B, config)
  held_BxW = block_B[:, None] - age_BxW
  position_BxW = origin_B[:, None] + held_BxW * config.block_size + place_W[None]
  return jnp.where((held_BxW >= 0) & (position_BxW < length_B[:, None]), position_BxW, L)
