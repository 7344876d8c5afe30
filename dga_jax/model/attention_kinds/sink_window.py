"""Attention to the first tokens and the last ones: sliding window, StreamingLLM, LM-Infinite.

The three differ in how many first tokens (sinks) stay, and in the distance at which a query sees
one that has fallen out of its window. Arrays carry RoPE at their true positions, and a rotation
depends on the difference of positions alone; so a sink is seen at another distance by turning its
key on by the difference.
"""

import dataclasses
import math
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from dga_jax.attention.segments import Documents, find_documents
from dga_jax.model.rope import apply_rope, rope_table
from pallas_kernels.gather import take_positions
from pallas_kernels.masks import masked_softmax

BLOCK_Q = 256

# How far away a query sees a sink: as far as it is; where it lies in the cache, whose tokens are
# counted without gaps; or no farther than the window is long.
SinkDistance = Literal["true", "in_cache", "at_most_window"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowCache:
  """Keys and values; in decoding every array has a leading axis of layers.

  Attributes:
    sink_key: the first S tokens.
    sink_value: likewise.
    ring_key: the last W of the other tokens: token p is in slot (p − S) mod W.
    ring_value: likewise.
    length: tokens that each sequence has seen.
  """

  sink_key: Float[Array, "*layers B N S D"]
  sink_value: Float[Array, "*layers B N S D"]
  ring_key: Float[Array, "*layers B N W D"]
  ring_value: Float[Array, "*layers B N W D"]
  length: Int[Array, "*layers B"]


@dataclasses.dataclass(frozen=True)
class WindowAttention:
  """Each query sees the first `sinks` tokens of its document and the last `window` of the others.

  Attributes:
    window: W, the query's own token among them.
    sinks: S.
    sink_distance: see `SinkDistance`.
    inverse_frequencies: of RoPE, float [D/2], by which sinks are turned.
  """

  window: int
  sinks: int = 0
  sink_distance: SinkDistance = "true"
  inverse_frequencies: np.ndarray | None = None

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    *,
    segment_ids: Int[Array, "B L"] | None,
    lengths: Int[Array, "B"] | None,
  ) -> Float[Array, "B L H D"]:
    """Attention inside each document, a block of queries at a time; padded queries give 0."""
    B, L, H, D = q_BxLxHxD.shape
    N = k_BxLxNxD.shape[2]
    block = min(BLOCK_Q, L)
    padded = math.ceil(L / block) * block
    documents = find_documents(B, L, lengths, segment_ids)
    row = _Row.of(k_BxLxNxD, v_BxLxNxD, documents, padded)
    q_BxLxHxD = _pad(q_BxLxHxD, padded)

    @jax.checkpoint
    def attend_block(start: Array) -> Array:
      q_BxbxHxD = jax.lax.dynamic_slice_in_dim(q_BxLxHxD, start, block, axis=1)
      sources = [self._window_source(row, start, block)]
      if self.sinks:
        sources.append(self._sink_source(row, start, block))
      return _attend(q_BxbxHxD.reshape(B, block, N, H // N, D), sources).reshape(B, block, H, D)

    o_TxBxbxHxD = jax.lax.map(attend_block, jnp.arange(0, padded, block))
    return jnp.moveaxis(o_TxBxbxHxD, 0, 1).reshape(B, padded, H, D)[:, :L]

  def init_cache(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> WindowCache:
    """An empty cache of one layer: sinks + window tokens, or `max_length` if that is less."""
    sinks = min(self.sinks, max_length)
    slots = min(self.window, max_length - sinks)
    sink = jnp.zeros((batch, num_kv_heads, sinks, head_dim), dtype)
    ring = jnp.zeros((batch, num_kv_heads, slots, head_dim), dtype)
    return WindowCache(sink, sink, ring, ring, jnp.zeros(batch, jnp.int32))

  def prefill(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    *,
    lengths: Int[Array, "B"] | None,
    max_length: int,
  ) -> tuple[Float[Array, "B L H D"], WindowCache]:
    """Attends over a right-padded prompt and stores its first and last tokens."""
    B, L, N, D = k_BxLxNxD.shape
    o_BxLxHxD = self.attend(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, segment_ids=None, lengths=lengths)
    empty = self.init_cache(B, max_length, N, D, k_BxLxNxD.dtype)
    length_B = jnp.full(B, L, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    S, W = empty.sink_key.shape[2], empty.ring_key.shape[2]
    place_BxW = _last_in_slot(length_B - S, W)
    ring_BxW = jnp.where(place_BxW >= 0, place_BxW + S, L)
    sink_BxS = jnp.broadcast_to(jnp.arange(S)[None], (B, S))
    return o_BxLxHxD, WindowCache(
      sink_key=take_positions(k_BxLxNxD, sink_BxS).swapaxes(1, 2),
      sink_value=take_positions(v_BxLxNxD, sink_BxS).swapaxes(1, 2),
      ring_key=take_positions(k_BxLxNxD, ring_BxW).swapaxes(1, 2),
      ring_value=take_positions(v_BxLxNxD, ring_BxW).swapaxes(1, 2),
      length=length_B,
    )

  def decode(
    self,
    q_BxHxD: Float[Array, "B H D"],
    k_BxNxD: Float[Array, "B N D"],
    v_BxNxD: Float[Array, "B N D"],
    cache: WindowCache,
    layer: Int[Array, ""],
  ) -> tuple[Float[Array, "B H D"], WindowCache]:
    """Stores one token, over the one that leaves the window, and attends to the cache."""
    (B, H, D), N = q_BxHxD.shape, k_BxNxD.shape[1]
    S, W = cache.sink_key.shape[-2], cache.ring_key.shape[-2]
    position_B = cache.length[layer]
    # An index beyond an array's end writes nothing.
    sink_B = jnp.where(position_B < S, position_B, S)
    ring_B = jnp.where(position_B < S, W, (position_B - S) % max(W, 1))
    row_B = jnp.arange(B)

    def put(array: Array, slot_B: Array, token_BxNxD: Array) -> Array:
      return array.at[layer, row_B, :, slot_B].set(token_BxNxD, mode="drop")

    cache = WindowCache(
      sink_key=put(cache.sink_key, sink_B, k_BxNxD),
      sink_value=put(cache.sink_value, sink_B, v_BxNxD),
      ring_key=put(cache.ring_key, ring_B, k_BxNxD),
      ring_value=put(cache.ring_value, ring_B, v_BxNxD),
      length=cache.length.at[layer].add(1),
    )
    sink_BxS, slot_W = jnp.arange(S)[None], jnp.arange(W)
    key_BxSxNxD = self._turn(cache.sink_key[layer].swapaxes(1, 2), position_B[:, None], sink_BxS)
    sinks = _Source(
      key_BxSxNxD[:, None],
      cache.sink_value[layer].swapaxes(1, 2)[:, None],
      (sink_BxS <= position_B[:, None])[:, None],
    )
    ring = _Source(
      cache.ring_key[layer].swapaxes(1, 2)[:, None],
      cache.ring_value[layer].swapaxes(1, 2)[:, None],
      (slot_W[None] <= position_B[:, None] - S)[:, None],
    )
    o_Bx1xNxRxD = _attend(q_BxHxD.reshape(B, 1, N, H // N, D), [ring, sinks])
    return o_Bx1xNxRxD.reshape(B, H, D), cache

  def _window_source(self, row: "_Row", start: Array, block: int) -> "_Source":
    """The piece of the row in which the windows of a block of queries lie."""
    size = min(block + self.window, row.key.shape[1])
    first = jnp.clip(start + block - size, 0)
    position_s = first + jnp.arange(size)
    i_b = start + jnp.arange(block)
    start_Bxb, token_Bxb = (
      jax.lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in (row.start, row.is_token)
    )
    after_bxs = position_s[None] > i_b[:, None] - self.window
    causal_bxs = position_s[None] <= i_b[:, None]
    inside_Bxbxs = position_s[None, None] >= start_Bxb[..., None] + self.sinks
    key, value = (
      jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)[:, None] for x in (row.key, row.value)
    )
    visible_Bxbxs = (after_bxs & causal_bxs)[None] & inside_Bxbxs & token_Bxb[..., None]
    return _Source(key, value, visible_Bxbxs)

  def _sink_source(self, row: "_Row", start: Array, block: int) -> "_Source":
    """The first tokens of each query's document, seen at `sink_distance`."""
    start_Bxb, token_Bxb = (
      jax.lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in (row.start, row.is_token)
    )
    B = start_Bxb.shape[0]
    sink_1x1xS = jnp.arange(self.sinks)[None, None]
    place_Bxb = start + jnp.arange(block)[None] - start_Bxb  # in the document
    index_BxbS = (start_Bxb[..., None] + sink_1x1xS).reshape(B, -1)
    shape = (B, block, self.sinks, *row.key.shape[2:])
    key, value = (take_positions(x, index_BxbS).reshape(shape) for x in (row.key, row.value))
    visible_BxbxS = (sink_1x1xS <= place_Bxb[..., None]) & token_Bxb[..., None]
    return _Source(self._turn(key, place_Bxb[..., None], sink_1x1xS), value, visible_BxbxS)

  def _turn(self, key: Array, query_position: Array, sink: Array) -> Array:
    """Sinks' keys [..., S, N, D], turned to where a query at `query_position` is to see them."""
    if self.sink_distance == "in_cache":
      ahead = query_position - (self.sinks + self.window - 1) + 0 * sink
    elif self.sink_distance == "at_most_window":
      ahead = query_position - sink - self.window
    else:
      return key
    assert self.inverse_frequencies is not None
    table = rope_table(jnp.maximum(ahead, 0).reshape(1, -1), self.inverse_frequencies)
    return apply_rope(key.reshape(1, -1, *key.shape[-2:]), table).reshape(key.shape)


@dataclasses.dataclass(frozen=True)
class _Row:
  """What every block of queries reads, padded to whole blocks."""

  key: Float[Array, "B L N D"]
  value: Float[Array, "B L N D"]
  start: Int[Array, "B L"]  # of the document
  is_token: Bool[Array, "B L"]

  @classmethod
  def of(cls, key: Array, value: Array, documents: Documents, padded: int) -> Self:
    return cls(
      _pad(key, padded),
      _pad(value, padded),
      _pad(documents.start, padded),
      _pad(documents.is_token, padded),
    )


@dataclasses.dataclass(frozen=True)
class _Source:
  """Keys that a block of queries may see; T is b where each query has its own, else 1."""

  key: Float[Array, "B T s N D"]
  value: Float[Array, "B T s N D"]
  visible: Bool[Array, "B b s"]


def _attend(q_BxbxNxRxD: Array, sources: list[_Source]) -> Float[Array, "B b N R D"]:
  """One softmax over all sources, with float32 statistics."""
  scale = q_BxbxNxRxD.shape[-1] ** -0.5
  q = q_BxbxNxRxD

  def product(equations: tuple[str, str], a: Array, b_BxTxsxNxD: Array) -> Array:
    if b_BxTxsxNxD.shape[1] == 1:
      return jnp.einsum(equations[0], a, b_BxTxsxNxD[:, 0], preferred_element_type=jnp.float32)
    return jnp.einsum(equations[1], a, b_BxTxsxNxD, preferred_element_type=jnp.float32)

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


def _pad(x_BxL: Array, length: int) -> Array:
  """Zeros (False) to the right, up to `length`."""
  return jnp.pad(x_BxL, ((0, 0), (0, length - x_BxL.shape[1])) + ((0, 0),) * (x_BxL.ndim - 2))


def _last_in_slot(count_B: Array, size: int) -> Int[Array, "B W"]:
  """Which of items 0 … count − 1, written round a ring of `size`, each slot holds; −1 for none."""
  slot_W = jnp.arange(size)
  turns_BxW = (count_B[:, None] - 1 - slot_W[None]) // max(size, 1)
  return jnp.where(turns_BxW >= 0, slot_W[None] + size * turns_BxW, -1)
