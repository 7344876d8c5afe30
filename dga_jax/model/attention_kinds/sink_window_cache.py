"""A cache of the first tokens (sinks) and of a window of the last ones, and decoding over it.

Sliding-window attention, StreamingLLM, LM-Infinite and the sink windows of head budgets share it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from dga_jax.choices import CacheDtypeName
from dga_jax.model.attention_kinds.base import AttentionKind
from pallas_kernels import dispatch
from pallas_kernels.decode import TokenRows
from pallas_kernels.gather import take_positions
from pallas_kernels.masks import masked_softmax
from pallas_kernels.products import einsum_float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SinkWindowCache:
  """Keys and values of the sinks and the window. While decoding, arrays have an axis of layers.

  Attributes:
    sinks: the first S tokens.
    ring: the last W of the other tokens; token p is in slot (p − S) mod W.
    length: tokens that each sequence has seen.
  """

  sinks: TokenRows
  ring: TokenRows
  length: Int[Array, "*layers B"]

  @property
  def sizes(self) -> tuple[int, int]:
    """S and W."""
    return self.sinks.key.shape[-2], self.ring.key.shape[-2]


@dataclasses.dataclass(frozen=True)
class SinkWindowCacheAttention(AttentionKind):
  """Each query sees the first `sinks` tokens of its document and the last `window` others.

  Subclasses define `prepare`, whose metadata has the field `documents`, and `attend`.

  Attributes:
    name: the attention kind.
    window: W, the query's own token included.
    sinks: S.
    cache_dtype: the 8-bit dtype in which the cache stores tokens; None for that of the model.
      `decode` and `extend` read the rounded tokens, and `attend` the exact ones.
  """

  name: str
  window: int
  sinks: int = 0
  cache_dtype: CacheDtypeName | None = dataclasses.field(default=None, kw_only=True)

  def init_cache(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> SinkWindowCache:
    """An empty cache of one layer: sinks + window tokens, or `max_length` if that is less."""
    sinks = min(self.sinks, max_length)
    slots = min(self.window, max_length - sinks)

    def empty(entries: int) -> TokenRows:
      shape = (batch, num_kv_heads, entries, head_dim)
      return TokenRows.empty(shape, self.cache_dtype or dtype)

    return SinkWindowCache(empty(sinks), empty(slots), jnp.zeros(batch, jnp.int32))

  def prefill(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: Any,
    *,
    max_length: int,
  ) -> tuple[Float[Array, "B L H D"], SinkWindowCache]:
    """Attends over right-padded prompts and stores their first and last tokens."""
    o_BxLxHxD = self.attend(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, metadata)
    return o_BxLxHxD, self.cache_prompt(k_BxLxNxD, v_BxLxNxD, metadata, max_length=max_length)

  def cache_prompt(
    self,
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: Any,
    *,
    max_length: int,
  ) -> SinkWindowCache:
    """The cache after right-padded prompts."""
    B, L, N, D = k_BxLxNxD.shape
    empty = self.init_cache(B, max_length, N, D, k_BxLxNxD.dtype)
    length_B = metadata.documents.row_length
    S, W = empty.sizes
    held_BxW = _last_in_slot(length_B - S, W)
    ring_BxW = jnp.where(held_BxW >= 0, held_BxW + S, L)
    sink_BxS = jnp.broadcast_to(jnp.arange(S)[None], (B, S))

    def stored(position_Bxs: Array) -> TokenRows:
      key, value = (take_positions(x, position_Bxs) for x in (k_BxLxNxD, v_BxLxNxD))
      dtype = self.cache_dtype or key.dtype
      return TokenRows.pack(key.swapaxes(1, 2), value.swapaxes(1, 2), dtype)

    return SinkWindowCache(stored(sink_BxS), stored(ring_BxW), length_B)

  def decode(
    self,
    q_BxHxD: Float[Array, "B H D"],
    k_BxNxD: Float[Array, "B N D"],
    v_BxNxD: Float[Array, "B N D"],
    cache: SinkWindowCache,
    layer: Int[Array, ""],
  ) -> tuple[Float[Array, "B H D"], SinkWindowCache]:
    """Replaces the token that leaves the window by the new one, and attends to the cache."""
    stepped: tuple[Array, SinkWindowCache] = dispatch.run(
      "window_decode_step", None, q_BxHxD, k_BxNxD, v_BxNxD, cache, layer, kind=self
    )
    return stepped

  def _decode(
    self, q_BxHxD: Array, k_BxNxD: Array, v_BxNxD: Array, cache: SinkWindowCache, layer: Array
  ) -> tuple[Array, SinkWindowCache]:
    (B, H, D), N = q_BxHxD.shape, k_BxNxD.shape[1]
    S, W = cache.sizes
    position_B = cache.length[layer]
    # A slot beyond the array's end is not written.
    sink_B = jnp.where(position_B < S, position_B, S)
    ring_B = jnp.where(position_B < S, W, (position_B - S) % max(W, 1))
    row_B = jnp.arange(B)
    new = TokenRows.pack(k_BxNxD, v_BxNxD, cache.ring.key.dtype)
    cache = SinkWindowCache(
      cache.sinks.write((layer, row_B, slice(None), sink_B), new),
      cache.ring.write((layer, row_B, slice(None), ring_B), new),
      cache.length.at[layer].add(1),
    )
    sinks = self._cached_sinks(cache, layer, position_B[:, None], q_BxHxD.dtype)
    is_held_BxW = jnp.arange(W)[None] <= position_B[:, None] - S
    ring = KeySource(*_cached(cache.ring, layer, q_BxHxD.dtype), is_held_BxW[:, None])
    o_Bx1xNxRxD = attend_to_sources(q_BxHxD.reshape(B, 1, N, H // N, D), [ring, sinks])
    return o_Bx1xNxRxD.reshape(B, H, D), cache

  def extend(
    self,
    q_BxTxHxD: Float[Array, "B T H D"],
    k_BxTxNxD: Float[Array, "B T N D"],
    v_BxTxNxD: Float[Array, "B T N D"],
    cache: SinkWindowCache,
    layer: Int[Array, ""],
    *,
    lengths: Int[Array, "B"],
  ) -> tuple[Float[Array, "B T H D"], SinkWindowCache]:
    """Appends several tokens; computes the outputs of decoding them one by one."""
    (B, T, H, D), N = q_BxTxHxD.shape, k_BxTxNxD.shape[2]
    S, W = cache.sizes
    before_B, new_T = cache.length[layer], jnp.arange(T)
    position_BxT = before_B[:, None] + new_T[None]
    held_BxW = _last_in_slot(before_B - S, W)
    near_BxTxW = position_BxT[..., None] - (held_BxW + S)[:, None] < self.window
    dtype = q_BxTxHxD.dtype
    ring = KeySource(*_cached(cache.ring, layer, dtype), near_BxTxW & (held_BxW >= 0)[:, None])
    distance_TxT = new_T[:, None] - new_T[None]
    near_TxT = (distance_TxT >= 0) & (distance_TxT < self.window)
    new = TokenRows.pack(k_BxTxNxD, v_BxTxNxD, cache.ring.key.dtype)
    key, value = (x_BxTxNxD[:, None] for x_BxTxNxD in new.unpack(dtype))
    chunk = KeySource(key, value, near_TxT[None] & (position_BxT >= S)[:, None])
    is_token_BxT = new_T[None] < lengths[:, None]
    # A slot beyond the array's end is not written. The last W tokens alone stay in the ring.
    sink_BxT = jnp.where(is_token_BxT & (position_BxT < S), position_BxT, S)
    stays_BxT = is_token_BxT & (position_BxT >= S) & (new_T[None] >= lengths[:, None] - W)
    ring_BxT = jnp.where(stays_BxT, (position_BxT - S) % max(W, 1), W)
    row_Bx1 = jnp.arange(B)[:, None]
    cache = SinkWindowCache(
      cache.sinks.write((layer, row_Bx1, slice(None), sink_BxT), new),
      cache.ring.write((layer, row_Bx1, slice(None), ring_BxT), new),
      cache.length.at[layer].add(lengths),
    )
    sources = [ring, chunk, self._cached_sinks(cache, layer, position_BxT, dtype)]
    o_BxTxNxRxD = attend_to_sources(q_BxTxHxD.reshape(B, T, N, H // N, D), sources)
    return o_BxTxNxRxD.reshape(B, T, H, D), cache

  def _cached_sinks(
    self, cache: SinkWindowCache, layer: Array, position_BxT: Int[Array, "B T"], dtype: DTypeLike
  ) -> "KeySource":
    """The sinks in a layer's cache, for queries at the given positions."""
    key_Bx1xSxNxD, value_Bx1xSxNxD = _cached(cache.sinks, layer, dtype)
    seen_BxTxS = jnp.arange(key_Bx1xSxNxD.shape[2])[None, None] <= position_BxT[..., None]
    return KeySource(self._place_sinks(key_Bx1xSxNxD, position_BxT), value_Bx1xSxNxD, seen_BxTxS)

  def _place_sinks(self, key: Array, position_BxT: Int[Array, "B T"]) -> Array:
    """Keys of sinks [B, T or 1, S, N, D] at the distance at which each query sees them."""
    del position_BxT
    return key


def _decode_xla(*step: Any, kind: SinkWindowCacheAttention) -> tuple[Array, SinkWindowCache]:
  return kind._decode(*step)


dispatch.define("window_decode_step", dispatch.Backend("xla", dispatch.ANY, _decode_xla))


@dataclasses.dataclass(frozen=True)
class KeySource:
  """Keys that b queries may see; T is b where each query has keys of its own, else 1."""

  key: Float[Array, "B T s N D"]
  value: Float[Array, "B T s N D"]
  visible: Bool[Array, "B b s"]


def attend_to_sources(
  q_BxbxNxRxD: Array, sources: Sequence[KeySource]
) -> Float[Array, "B b N R D"]:
  """One softmax over all sources, with float32 statistics."""
  scale = q_BxbxNxRxD.shape[-1] ** -0.5
  q = q_BxbxNxRxD

  def product(equations: tuple[str, str], a: Array, b_BxTxsxNxD: Array) -> Array:
    if b_BxTxsxNxD.shape[1] == 1:
      return einsum_float32(equations[0], a, b_BxTxsxNxD[:, 0])
    return einsum_float32(equations[1], a, b_BxTxsxNxD)

  to_logits = ("btnrd,bsnd->btnrs", "btnrd,btsnd->btnrs")
  logits = jnp.concatenate([product(to_logits, q, one.key) for one in sources], axis=-1)
  visible_Bxbxs = jnp.concatenate([one.visible for one in sources], axis=-1)
  weights = masked_softmax(scale * logits, visible_Bxbxs[:, :, None, None])
  ends = np.cumsum([one.visible.shape[-1] for one in sources])[:-1]
  to_output = ("btnrs,bsnd->btnrd", "btnrs,btsnd->btnrd")
  out = sum(
    product(to_output, part.astype(q.dtype), one.value)
    for part, one in zip(jnp.split(weights, ends, axis=-1), sources, strict=True)
  )
  return jnp.asarray(out).astype(q.dtype)


def _cached(
  rows: TokenRows, layer: Array, dtype: DTypeLike
) -> tuple[Float[Array, "B 1 s N D"], Float[Array, "B 1 s N D"]]:
  """Keys and values of a layer, the same for every query, for a `KeySource`."""
  key_BxNxsxD, value_BxNxsxD = rows.layer(layer).unpack(dtype)
  return key_BxNxsxD.swapaxes(1, 2)[:, None], value_BxNxsxD.swapaxes(1, 2)[:, None]


def _last_in_slot(count_B: Array, size: int) -> Int[Array, "B W"]:
  """The last of items 0 … count − 1 that each slot of a ring of `size` slots holds; −1 for none."""
  slot_W = jnp.arange(size)
  turns_BxW = (count_B[:, None] - 1 - slot_W[None]) // max(size, 1)
  return jnp.where(turns_BxW >= 0, slot_W[None] + size * turns_BxW, -1)
