"""Many tokens at once into a cache that may already hold some: prompts in chunks, second turns."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dga_jax.attention.attend import attention_kwargs
from dga_jax.cache.prefill import ring_positions
from dga_jax.cache.state import CompactCache
from dga_jax.cache.summary import merge_blocks
from dga_jax.config import DGAConfig
from pallas_kernels.gather import take_positions
from pallas_kernels.grouped_attention import grouped_attention, KVSource, KVSources


def extend(
  query_BxTxHxD: Float[Array, "B T H D"],
  key_BxTxNxD: Float[Array, "B T N D"],
  value_BxTxNxD: Float[Array, "B T N D"],
  cache: CompactCache,
  config: DGAConfig,
  *,
  count_B: Int[Array, "B"],
  scale: float | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, "B T H D"], CompactCache]:
  """Appends up to T tokens to every sequence: what decoding them one by one would do.

  Blocks that become complete are summarised first. Attention then reads the compact entries, of
  which every query sees those of the blocks before its window, and raw tokens.

  Args:
    query_BxTxHxD: of the new tokens, right-padded.
    cache: of one layer, from a prefill, `empty_cache`, decoding or this function.
    count_B: new tokens of each sequence, 0 to T.
    scale: of the attention logits, default 1/√D.
    implementation: of grouped attention.

  Returns:
    The output, 0 in the padding, and the cache.
  """
  span = _Span.of(cache, count_B, query_BxTxHxD.shape[1], config)
  key, value = (
    span.window(raw, new)
    for raw, new in ((cache.raw_key, key_BxTxNxD), (cache.raw_value, value_BxTxNxD))
  )
  cache = _store_sinks(cache, key_BxTxNxD, value_BxTxNxD, span)
  cache = _store_blocks(cache, query_BxTxHxD, key, value, span)
  sources = _sources(cache, key, value, span)
  options = attention_kwargs(query_BxTxHxD, config, scale)
  options["max_window"] = (config.local_window + 1) * config.block_size
  out_BxTxHxD = grouped_attention(query_BxTxHxD, sources, implementation=implementation, **options)
  return out_BxTxHxD, _store_raw(cache, key, value, span)


@dataclasses.dataclass(frozen=True)
class _Span:
  """Where the new tokens stand.

  The raw window is an array of positions from `base` on, the start of the window of the first
  new token's block: (w + 1)·m' + T of them hold all that any new query sees raw.
  """

  config: DGAConfig
  tokens: int  # T
  length: Int[Array, "B"]  # before
  count: Int[Array, "B"]
  origin: Int[Array, "B"]
  first_block: Int[Array, "B"]
  base: Int[Array, "B"]

  @classmethod
  def of(cls, cache: CompactCache, count_B: Array, tokens: int, config: DGAConfig) -> "_Span":
    block_B = jnp.maximum(cache.length - cache.origin, 0) // config.block_size
    base_B = cache.origin + (block_B - config.local_window) * config.block_size
    return cls(config, tokens, cache.length, count_B, cache.origin, block_B, base_B)

  @property
  def position(self) -> Int[Array, "B T"]:
    """Of each new token; padding goes on counting."""
    return self.length[:, None] + jnp.arange(self.tokens)[None]

  @property
  def is_token(self) -> Bool[Array, "B T"]:
    return jnp.arange(self.tokens)[None] < self.count[:, None]

  def window(
    self, raw_BxNxWxD: Float[Array, "B N W D"], new_BxTxNxD: Float[Array, "B T N D"]
  ) -> Float[Array, "B S N D"]:
    """The raw window, from the ring and the new tokens; zeros where neither has a token."""
    W = raw_BxNxWxD.shape[2]
    size = self.config.block_size
    place_S = jnp.arange(W + self.tokens)
    position_BxS = self.base[:, None] + place_S[None]
    block_BxS = self.first_block[:, None] - self.config.local_window + place_S[None] // size
    slot_BxS = block_BxS % (self.config.local_window + 1) * size + place_S[None] % size
    old_BxS = position_BxS < self.length[:, None]
    index_BxS = jnp.where(old_BxS, slot_BxS, W + position_BxS - self.length[:, None])
    exists_BxS = (position_BxS >= self.origin[:, None]) & (
      position_BxS < (self.length + self.count)[:, None]
    )
    index_BxS = jnp.where(exists_BxS, index_BxS, W + self.tokens)
    both_BxSxNxD = jnp.concatenate([raw_BxNxWxD.swapaxes(1, 2), new_BxTxNxD], axis=1)
    return take_positions(both_BxSxNxD, index_BxS)


def _store_sinks(
  cache: CompactCache, key_BxTxNxD: Array, value_BxTxNxD: Array, span: _Span
) -> CompactCache:
  """New tokens before the first block go to the prefix."""
  in_prefix_BxT = span.is_token & (span.position < span.origin[:, None])
  return _put_entries(cache, span.position, in_prefix_BxT, key_BxTxNxD, value_BxTxNxD)


def _store_blocks(
  cache: CompactCache, query_BxTxHxD: Array, key_BxSxNxD: Array, value_BxSxNxD: Array, span: _Span
) -> CompactCache:
  """Summarises the blocks that become complete."""
  size, per_block = span.config.block_size, span.config.focal_in_block + 1
  (B, T, _, D), N = query_BxTxHxD.shape, key_BxSxNxD.shape[2]
  begin, blocks = span.config.local_window * size, T // size + 1
  block_BxK = span.first_block[:, None] + jnp.arange(blocks)[None]
  end_BxK = span.origin[:, None] + (block_BxK + 1) * size
  complete_BxK = end_BxK <= (span.length + span.count)[:, None]
  last_BxK = jnp.where(complete_BxK, end_BxK - 1 - span.length[:, None], 0)
  query_BxKxHxD = jnp.take_along_axis(query_BxTxHxD, last_BxK[:, :, None, None], axis=1)

  def in_blocks(x_BxSxNxD: Array) -> Array:
    return x_BxSxNxD[:, begin : begin + blocks * size].reshape(B, blocks, size, N, D)

  key_BxKxFxNxD, value_BxKxFxNxD = merge_blocks(
    query_BxKxHxD, in_blocks(key_BxSxNxD), in_blocks(value_BxSxNxD), span.config
  )
  entry_BxKxF = (cache.prefix[:, None] + per_block * block_BxK)[..., None]
  entry_BxKxF = entry_BxKxF + jnp.arange(per_block)[None, None]
  complete_BxKxF = jnp.broadcast_to(complete_BxK[..., None], entry_BxKxF.shape)
  flat = (B, blocks * per_block)
  return _put_entries(
    cache,
    entry_BxKxF.reshape(flat),
    complete_BxKxF.reshape(flat),
    key_BxKxFxNxD.reshape(*flat, N, D),
    value_BxKxFxNxD.reshape(*flat, N, D),
  )


def _put_entries(
  cache: CompactCache, slot_BxE: Array, chosen_BxE: Array, key_BxExNxD: Array, value_BxExNxD: Array
) -> CompactCache:
  """Writes some of E rows to their slots of the compact part; slots beyond its end are dropped."""
  B, _, C, _ = cache.compact_key.shape
  slot_BxE = jnp.where(chosen_BxE, slot_BxE, C)
  at = (jnp.arange(B)[:, None], slice(None), slot_BxE)
  return cache.put_compact(at, key_BxExNxD, value_BxExNxD)


type _KeyValue = tuple[Array, Array]


def _sources(
  cache: CompactCache, key_BxSxNxD: Array, value_BxSxNxD: Array, span: _Span
) -> KVSources:
  """Focal tokens, groups and the raw window, each with the range that a new query sees.

  Without a bias on groups all compact entries are read as one list, as they lie.
  """
  config = span.config
  f, size = config.focal_in_block, config.block_size
  after_BxT = span.position - span.origin[:, None]
  in_prefix_BxT = after_BxT < 0
  seen_BxT = jnp.maximum(jnp.maximum(after_BxT, 0) // size - config.local_window, 0)
  own_BxT = jnp.where(in_prefix_BxT, span.position + 1, 0)
  key_BxNxCxD, value_BxNxCxD = cache.compact
  compact = (key_BxNxCxD.swapaxes(1, 2), value_BxNxCxD.swapaxes(1, 2))
  if config.group_logit_bias == "none":
    focal, group = compact, (compact[0][:, :0], compact[1][:, :0])
    focal_end_BxT = own_BxT + ~in_prefix_BxT * (cache.prefix[:, None] + (f + 1) * seen_BxT)
    group_end_BxT = jnp.zeros_like(focal_end_BxT)
  else:
    focal, group = _split(cache, compact, f)
    focal_end_BxT = own_BxT + ~in_prefix_BxT * (cache.prefix_focal[:, None] + f * seen_BxT)
    groups_B = cache.prefix - cache.prefix_focal
    group_end_BxT = ~in_prefix_BxT * (groups_B[:, None] + seen_BxT)
  first_BxT = span.origin[:, None] + seen_BxT * size - span.base[:, None]
  end_BxT = jnp.where(in_prefix_BxT, first_BxT, span.position + 1 - span.base[:, None])

  def visible(start_BxT: Array, end_BxT: Array) -> tuple[Array, Array]:
    """With the axis of heads; padding sees nothing."""
    start_BxT = jnp.where(span.is_token, start_BxT, end_BxT)
    return start_BxT[:, None], end_BxT[:, None]

  zero_BxT = jnp.zeros_like(end_BxT)
  return KVSources(
    focal=KVSource(*focal, *visible(zero_BxT, focal_end_BxT)),
    group=KVSource(*group, *visible(zero_BxT, group_end_BxT)),
    window=KVSource(key_BxSxNxD, value_BxSxNxD, *visible(first_BxT, end_BxT)),
  )


def _split(cache: CompactCache, compact: _KeyValue, f: int) -> tuple[_KeyValue, _KeyValue]:
  """The compact entries' focal tokens, and their groups, each in order."""
  B, C, *_ = compact[0].shape
  focal_B, groups_B = cache.prefix_focal[:, None], (cache.prefix - cache.prefix_focal)[:, None]
  slot_BxC = jnp.broadcast_to(jnp.arange(C)[None], (B, C))
  later_BxC = slot_BxC - focal_B
  focal_BxC = jnp.where(
    later_BxC < 0, slot_BxC, cache.prefix[:, None] + later_BxC // f * (f + 1) + later_BxC % f
  )
  later_BxC = slot_BxC - groups_B
  group_BxC = jnp.where(
    later_BxC < 0, focal_B + slot_BxC, cache.prefix[:, None] + later_BxC * (f + 1) + f
  )

  def take(index_BxC: Array) -> _KeyValue:
    return take_positions(compact[0], index_BxC), take_positions(compact[1], index_BxC)

  return take(focal_BxC), take(group_BxC)


def _store_raw(
  cache: CompactCache, key_BxSxNxD: Array, value_BxSxNxD: Array, span: _Span
) -> CompactCache:
  """The ring holds the last w + 1 blocks again."""
  length_B = span.length + span.count
  none = jnp.iinfo(jnp.int32).max // 2
  position_BxW = ring_positions(length_B, span.origin, none, span.config)
  index_BxW = position_BxW - span.base[:, None]
  return dataclasses.replace(
    cache,
    raw_key=take_positions(key_BxSxNxD, index_BxW).swapaxes(1, 2),
    raw_value=take_positions(value_BxSxNxD, index_BxW).swapaxes(1, 2),
    length=length_B,
  )
