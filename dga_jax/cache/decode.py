"""One decoding step over the compact cache, in place."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention.attend import merge_scale
from dga_jax.attention.selection import comparable_scores
from dga_jax.attention.validation import softmax_scale
from dga_jax.cache import validation
from dga_jax.cache.layout import cache_layout, TokenCoords
from dga_jax.cache.state import CompactCache
from dga_jax.cache.summary import block_entries
from dga_jax.config import DGAConfig
from pallas_kernels.decode import (
  BlockRule,
  decode_attention,
  GroupBias,
  has_step_kernel,
  step_in_place,
)
from pallas_kernels.dispatch import Implementation


def decode_step(
  query: Float[Array, "B *one H D"],
  key: Float[Array, "B *one N D"],
  value: Float[Array, "B *one N D"],
  cache: CompactCache,
  *,
  config: DGAConfig,
  focal_scores: Float[Array, "B *one N"] | None = None,
  layer: Int[Array, ""] | int | None = None,
  scale: float | None = None,
  implementation: Implementation = None,
) -> tuple[Float[Array, "B *one H D"], CompactCache]:
  """Appends one token to every sequence, attends, and summarizes the blocks that it completes.

  With s over the compact entries of the prefix and of the blocks before the token's window, and
  over the raw tokens from the window on, the token itself included:

      out_h = Σ_s softmax_s(scale · q_h·k_ns + bias_s) v_ns,   KV head n = ⌊h / (H/N)⌋

  where bias is log m for groups under `config.group_logit_bias` "log_size", else 0. When a token
  completes its block, f tokens of the block stay focal, chosen by the last query or by the focal
  scores, and the other m are merged by Eq. 14 of Zhang et al. (arXiv 2505.22107). The paper's cache
  flushes m + f pending tokens alike; it does not say that f of them stay exact. Each sequence
  completes its blocks at its own time.

  Shapes are static: jit the call once, with the cache donated, and call it for every token.

  Args:
    query: of the new tokens, in the dtype of the cache: [B, H, D], or [B, 1, H, D] as `prefill`
      takes queries of a prompt.
    key: after RoPE, if the model has it.
    value: as key.
    cache: from `prefill`, `empty_cache`, `extend` or this function.
    config: the config that the cache was made with.
    focal_scores: of the new tokens, float32, with the selector "fitted"; else None.
    layer: None for a cache of one layer. For a cache with a leading axis of layers, the layer to
      read and write: the token is then written in place, without a copy of the layer.
    scale: of the attention logits, default 1/√D.
    implementation: "triton" (kernels for the whole step), "mosaic_tpu" or "xla"; a tuple of names
      in order of preference; None for the first that can run the call.

  Returns:
    The output in the query's shape and dtype, and the cache with the new tokens.

  Raises:
    ValueError: if an argument does not fit the cache, or a sequence would exceed the cache's
      max_length. Under jit lengths are unknown: the compact entries of later blocks are dropped.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  if jnp.ndim(query) == 4 and all(jnp.shape(x)[1:2] == (1,) for x in (query, key, value)):
    query, key, value = (jnp.squeeze(x, 1) for x in (query, key, value))
    options: dict[str, Any] = {"layer": layer, "scale": scale, "implementation": implementation}
    if focal_scores is not None and jnp.shape(focal_scores)[1:2] == (1,):
      focal_scores = jnp.squeeze(focal_scores, 1)
    out, cache = decode_step(
      query, key, value, cache, config=config, focal_scores=focal_scores, **options
    )
    return out[:, None], cache
  validation.new_tokens(
    query,
    key,
    value,
    cache,
    focal_scores=focal_scores,
    axes="B H D",
    config=config,
    layer=layer,
  )
  validation.room(cache, 1, layer=layer)
  softmax_scale(scale)
  scores = None if focal_scores is None else comparable_scores(focal_scores)
  if layer is None:
    stacked = jax.tree.map(lambda x: x[None], cache)
    out, stacked = _step(query, key, value, scores, stacked, 0, config, scale, implementation)
    return out, jax.tree.map(lambda x: x[0], stacked)
  return _step(query, key, value, scores, cache, layer, config, scale, implementation)


def _step(
  query_BxHxD: Array,
  key_BxNxD: Array,
  value_BxNxD: Array,
  scores_BxN: Array | None,
  cache: CompactCache,
  layer: Array | int,
  config: DGAConfig,
  scale: float | None,
  implementation: Implementation,
) -> tuple[Array, CompactCache]:
  """`decode_step` on a cache with a leading axis of layers."""
  D = query_BxHxD.shape[-1]
  scale = D**-0.5 if scale is None else scale
  rule = block_rule(config, D)
  if has_step_kernel(query_BxHxD, cache.arrays, rule, implementation):
    out_BxHxD, arrays, length = step_in_place(
      query_BxHxD,
      key_BxNxD,
      value_BxNxD,
      cache.arrays,
      cache.lengths,
      layer,
      scores_BxN,
      rule=rule,
      scale=scale,
      group_bias=group_logit_bias(config),
    )
    lengths = cache.lengths._replace(length=length)
    return out_BxHxD, dataclasses.replace(cache, arrays=arrays, lengths=lengths)
  token = rule.layout.locate(cache.length[layer], cache.lengths.origin[layer])
  prefix_B = cache.lengths.prefix[layer]
  cache = _append(key_BxNxD, value_BxNxD, scores_BxN, cache, layer, token)
  # Attention reads no 8 bits: it gets a copy of this layer alone, unpacked.
  is_packed = cache.arrays.key_scale is not None
  out_BxHxD = decode_attention(
    query_BxHxD,
    cache.arrays.unpack(layer) if is_packed else cache.arrays,
    0 if is_packed else layer,
    rule.layout.visible(token, prefix_B),
    scale=scale,
    group_bias=_group_bias(cache, layer, config),
    implementation=implementation,
  )
  # The flush follows the read. Without the barrier XLA does not know it and copies the whole cache.
  out_BxHxD, cache = jax.lax.optimization_barrier((out_BxHxD, cache))
  return out_BxHxD, _flush(query_BxHxD, cache, layer, token, config)


def block_rule(config: DGAConfig, head_dim: int) -> BlockRule:
  """How a complete block becomes compact entries."""
  return BlockRule(cache_layout(config), head_dim**-0.5, merge_scale(config, head_dim))


def group_logit_bias(config: DGAConfig) -> float:
  """What is added to the logits of groups."""
  return math.log(config.group_size) if config.group_logit_bias == "log_size" else 0.0


def _group_bias(cache: CompactCache, layer: Array | int, config: DGAConfig) -> GroupBias | None:
  amount = group_logit_bias(config)
  if not amount:
    return None
  lengths = cache.lengths
  return GroupBias(amount, cache_layout(config), lengths.prefix[layer], lengths.prefix_focal[layer])


def _append(
  key_BxNxD: Array,
  value_BxNxD: Array,
  scores_BxN: Array | None,
  cache: CompactCache,
  layer: Array | int,
  token: TokenCoords,
) -> CompactCache:
  """Writes a token of the prefix to its compact entry, another one to its slot of the ring."""
  row_B = jnp.arange(key_BxNxD.shape[0], dtype=jnp.int32)
  C, W = cache.arrays.compact_key.shape[-2], cache.arrays.raw_key.shape[-2]
  # An index beyond the end writes nothing.
  entry_B = jnp.where(token.in_block, C, token.position)
  slot_B = jnp.where(token.in_block, token.slot, W)
  cache = cache.write_compact((layer, row_B, slice(None), entry_B), key_BxNxD, value_BxNxD)

  def write(ring: Array, token_BxNxD: Array) -> Array:
    return ring.at[layer, row_B, :, slot_B].set(token_BxNxD, mode="drop")

  arrays = cache.arrays._replace(
    raw_key=write(cache.arrays.raw_key, key_BxNxD),
    raw_value=write(cache.arrays.raw_value, value_BxNxD),
  )
  if scores_BxN is not None and arrays.block_score is not None:
    scores = arrays.block_score
    # A token of the prefix has offset 0, where the first token of the block overwrites its score.
    scores = scores.at[layer, row_B, :, token.offset].set(scores_BxN, mode="promise_in_bounds")
    arrays = arrays._replace(block_score=scores)
  lengths = cache.lengths._replace(length=cache.length.at[layer].add(1))
  return dataclasses.replace(cache, arrays=arrays, lengths=lengths)


def _flush(
  query_BxHxD: Array, cache: CompactCache, layer: Array | int, token: TokenCoords, config: DGAConfig
) -> CompactCache:
  """Writes the compact entries of the blocks that the token completes."""
  layout = cache_layout(config)

  @jax.vmap
  def block_of(ring_NxWxD: Array, begin: Array) -> Array:
    block_NxsxD = jax.lax.dynamic_slice_in_dim(ring_NxWxD, begin, layout.block_size, axis=1)
    return block_NxsxD.swapaxes(0, 1)

  key_BxsxNxD, value_BxsxNxD = (
    block_of(ring[layer], token.block_slot)
    for ring in (cache.arrays.raw_key, cache.arrays.raw_value)
  )
  scores = cache.arrays.block_score
  key_Bx1xFxNxD, value_Bx1xFxNxD = block_entries(
    query_BxHxD[:, None],
    key_BxsxNxD[:, None],
    value_BxsxNxD[:, None],
    config,
    None if scores is None else scores[layer][:, :, None],
  )
  first_B = layout.block_entry(token.block, cache.lengths.prefix[layer])
  entry_BxF = first_B[:, None] + jnp.arange(layout.entries_per_block, dtype=jnp.int32)[None]
  # An index beyond the end writes nothing.
  C = cache.arrays.compact_key.shape[-2]
  entry_BxF = jnp.where(layout.completes_block(token)[:, None], entry_BxF, C)
  at = (layer, jnp.arange(len(query_BxHxD), dtype=jnp.int32)[:, None], slice(None), entry_BxF)
  return cache.write_compact(at, key_Bx1xFxNxD[:, 0], value_Bx1xFxNxD[:, 0])
