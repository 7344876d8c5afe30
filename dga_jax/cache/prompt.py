"""Prefill: the compact cache after right-padded prompts, and their attention."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention.aggregate import plan_and_merge, zero_padding
from dga_jax.attention.attend import attend_entries
from dga_jax.attention.plan import GroupPlan
from dga_jax.attention.validation import query_and_key, softmax_scale, value_like_key
from dga_jax.cache import validation
from dga_jax.cache.layout import cache_layout, cache_size
from dga_jax.cache.state import CompactCache, lengths_with_sinks
from dga_jax.cache.validation import Lengths
from dga_jax.config import DGAConfig
from pallas_kernels.decode import CacheArrays, CacheLengths, pack_rows
from pallas_kernels.gather import take_rows
from pallas_kernels.group_merge import Entries


def prefill(
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  query: Float[Array, "B L H D"],
  *,
  config: DGAConfig,
  max_length: int,
  lengths: Lengths | None = None,
  implementation: str | None = None,
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
    lengths: int [B], tokens of each prompt, the rest being right padding; a list works. None where
      every prompt has L tokens, and the cache then has its exact size, see `cache_size`.
    implementation: of merging: "xla", or None for the kernels of the arrays' device.

  Returns:
    The cache, to be passed to `decode_step` or `extend`.

  Raises:
    ValueError: names the argument that does not fit and what it must be.
  """
  lengths = _checked(query, key, value, max_length, lengths)
  plan, _, entries = plan_and_merge(
    query, key, value, config=config, lengths=lengths, implementation=implementation
  )
  return _cache_prompt(key, value, plan, entries, max_length)


def attend_and_prefill(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  *,
  config: DGAConfig,
  max_length: int,
  lengths: Lengths | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, "B L H D"], CompactCache]:
  """Attention over right-padded prompts, and the cache after them.

  Computes `dga_jax.dynamic_group_attention` and `prefill` from one plan.

  Args:
    query: see `prefill`, as key, value, config, max_length and lengths.
    scale: of the attention logits, default 1/√D.
    implementation: of attention; "xla" also merges in XLA.

  Returns:
    The output [B, L, H, D] in the query's dtype, 0 in the padding, and the cache.

  Raises:
    ValueError: names the argument that does not fit and what it must be.
    NotImplementedError: if the named implementation cannot compute this call, and why.
  """
  lengths = _checked(query, key, value, max_length, lengths)
  softmax_scale(scale)
  plan, query, entries = plan_and_merge(
    query,
    key,
    value,
    config=config,
    lengths=lengths,
    implementation="xla" if implementation == "xla" else None,
  )
  out = attend_entries(query, entries, plan, scale=scale, implementation=implementation)
  return out, _cache_prompt(key, value, plan, entries, max_length)


def _checked(
  query: Array, key: Array, value: Array, max_length: int, lengths: Lengths | None
) -> Int[Array, "B"] | None:
  query_and_key(query, key)
  value_like_key(value, key)
  batch, length = key.shape[:2]
  validation.prompt_fits(length, max_length)
  return None if lengths is None else validation.as_array(lengths, batch, length)


def _cache_prompt(
  key_BxLxNxD: Array, value_BxLxNxD: Array, plan: GroupPlan, entries: Entries, max_length: int
) -> CompactCache:
  """The cache after prompts, from their plan and merged entries."""
  key_BxLxNxD, value_BxLxNxD = zero_padding(plan.documents, plan.padded, key_BxLxNxD, value_BxLxNxD)
  config = plan.config
  L = key_BxLxNxD.shape[1]
  size = cache_size(config=config, max_length=max_length, prompt=L, ragged=plan.padded)
  entries = _asked_for(plan, entries)
  if config.selection == "streaming":
    lengths = lengths_with_sinks(plan.documents.length[:, 0], config.sink_tokens)
    compact = _interleave(entries, config)
  else:
    focal_B = plan.focal_mask.sum(axis=-1, dtype=jnp.int32)[:, 0]
    lengths, compact = _prompt_lengths(plan, focal_B), _concatenate(entries, focal_B)
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
  )
  return CompactCache(arrays, lengths, max_length)


def _asked_for(plan: GroupPlan, entries: Entries) -> Entries:
  """Without the rows of padding that kernels append."""
  r, k = plan.focal_index.shape[-1], plan.group_query.shape[-1]
  return entries._replace(
    focal_key=entries.focal_key[:, :r],
    focal_value=entries.focal_value[:, :r],
    group_key=entries.group_key[:, :k],
    group_value=entries.group_value[:, :k],
  )


def _prompt_lengths(plan: GroupPlan, focal_B: Array) -> CacheLengths:
  """The whole prompt is in the prefix.

  A prompt shorter than the sinks is all focal, and the next tokens complete the sinks.
  """
  config, length_B = plan.config, plan.documents.length[:, 0]
  sinks_B = jnp.full(length_B.shape, config.sink_tokens, jnp.int32)
  groups_B = (length_B - focal_B) // config.group_size
  has_sinks_B = length_B >= sinks_B
  return CacheLengths(
    length=length_B,
    origin=jnp.maximum(length_B, sinks_B),
    prefix=jnp.where(has_sinks_B, focal_B + groups_B, sinks_B),
    prefix_focal=jnp.where(has_sinks_B, focal_B, sinks_B),
  )


def _interleave(entries: Entries, config: DGAConfig) -> tuple[Array, Array]:
  """Streaming selection: the sinks, then the f focal tokens and the group of each block."""
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


def _concatenate(entries: Entries, focal_B: Array) -> tuple[Array, Array]:
  """Other selections: the focal tokens of each row, then its groups, without a gap."""
  B, r, N, _ = entries.focal_key.shape
  slot = jnp.arange(r + entries.group_key.shape[1])[None]
  source_BxS = jnp.where(slot < focal_B[:, None], slot, slot - focal_B[:, None] + r)
  source_BxNxS = jnp.broadcast_to(source_BxS[:, None], (B, N, source_BxS.shape[1]))

  def concatenate(focal_BxrxNxD: Array, group_BxkxNxD: Array) -> Array:
    return take_rows(jnp.concatenate([focal_BxrxNxD, group_BxkxNxD], axis=1), source_BxNxS)

  return (
    concatenate(entries.focal_key, entries.group_key),
    concatenate(entries.focal_value, entries.group_value),
  )


def _heads_first(x_BxSxNxD: Array, size: int) -> Float[Array, "B N S D"]:
  """Cut or padded with zeros to `size` entries. No sequence has an entry in what is cut off."""
  x_BxNxSxD = x_BxSxNxD[:, :size].swapaxes(1, 2)
  return jnp.pad(x_BxNxSxD, ((0, 0), (0, 0), (0, size - x_BxNxSxD.shape[2]), (0, 0)))


def ring_index(lengths: CacheLengths, config: DGAConfig, *, none: int) -> Int[Array, "B W"]:
  """The position of the token in each raw slot, `none` for an empty slot."""
  layout = cache_layout(config)
  position_BxW, is_held_BxW = layout.ring_positions(
    jnp.arange(layout.raw_size)[None], lengths.length[:, None], lengths.origin[:, None]
  )
  return jnp.where(is_held_BxW, position_BxW, none)
