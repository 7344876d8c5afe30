"""Attention to the first tokens (sinks) and to a window of the last ones.

Sliding-window attention, StreamingLLM and LM-Infinite differ in the number of sinks and in the
distance at which a query sees a sink that has left its window. Keys carry RoPE at their true
positions. A rotation depends on the difference of positions alone, so rotating a sink's key
further by the difference places it at another distance.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from dga_jax.attention.segments import Documents
from dga_jax.model.attention_kinds.base import AttentionKind
from dga_jax.model.rope import apply_rope, rope_table
from pallas_kernels.gather import take_positions
from pallas_kernels.masks import masked_softmax

BLOCK_Q = 256

# The distance at which a query sees a sink: the true one; the one between their slots in the cache,
# whose tokens have no gaps; or the true one, at most the window's length.
SinkDistance = Literal["true", "in_cache", "at_most_window"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SinkWindowCache:
  """Keys and values of the sinks and the window. While decoding, arrays have an axis of layers.

  Attributes:
    sink_key: keys of the first S tokens.
    sink_value: their values.
    ring_key: keys of the last W of the other tokens; token p is in slot (p − S) mod W.
    ring_value: their values.
    length: tokens that each sequence has seen.
  """

  sink_key: Float[Array, "*layers B N S D"]
  sink_value: Float[Array, "*layers B N S D"]
  ring_key: Float[Array, "*layers B N W D"]
  ring_value: Float[Array, "*layers B N W D"]
  length: Int[Array, "*layers B"]


class SinkWindowMetadata(NamedTuple):
  """The rows, and two of their arrays padded to whole blocks of queries, P tokens."""

  documents: Documents
  start: Int[Array, "B P"]  # first position of the token's document
  is_token: Bool[Array, "B P"]


@dataclasses.dataclass(frozen=True)
class SinkWindowAttention(AttentionKind):
  """Each query sees the first `sinks` tokens of its document and the last `window` others.

  Attributes:
    name: the attention kind.
    window: W, the query's own token included.
    sinks: S.
    sink_distance: see `SinkDistance`.
    inverse_frequencies: ω [D/2] of the model's RoPE, which rotates sinks; may be empty where
      `sink_distance` is "true".
  """

  name: str
  window: int
  sinks: int = 0
  sink_distance: SinkDistance = "true"
  inverse_frequencies: tuple[float, ...] = ()

  def prepare(self, documents: Documents) -> SinkWindowMetadata:
    """Pads the rows to whole blocks of queries."""
    L = documents.index.shape[1]
    padded = padded_length(L)
    return SinkWindowMetadata(
      documents, _pad(documents.start, padded), _pad(documents.is_token, padded)
    )

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: SinkWindowMetadata,
  ) -> Float[Array, "B L H D"]:
    """Attention inside each document, one block of queries at a time; padding outputs 0."""
    B, L, H, D = q_BxLxHxD.shape
    N = k_BxLxNxD.shape[2]
    block, padded = min(BLOCK_Q, L), padded_length(L)
    row = _Row(_pad(k_BxLxNxD, padded), _pad(v_BxLxNxD, padded), *metadata[1:])
    q_BxPxHxD = _pad(q_BxLxHxD, padded)

    @jax.checkpoint
    def attend_block(start: Array) -> Array:
      q_BxbxHxD = jax.lax.dynamic_slice_in_dim(q_BxPxHxD, start, block, axis=1)
      sources = [self._window_source(row, start, block)]
      if self.sinks:
        sources.append(self._sink_source(row, start, block))
      return _attend(q_BxbxHxD.reshape(B, block, N, H // N, D), sources).reshape(B, block, H, D)

    o_TxBxbxHxD = jax.lax.map(attend_block, jnp.arange(0, padded, block))
    return jnp.moveaxis(o_TxBxbxHxD, 0, 1).reshape(B, padded, H, D)[:, :L]

  def init_cache(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> SinkWindowCache:
    """An empty cache of one layer: sinks + window tokens, or `max_length` if that is less."""
    sinks = min(self.sinks, max_length)
    slots = min(self.window, max_length - sinks)
    sink = jnp.zeros((batch, num_kv_heads, sinks, head_dim), dtype)
    ring = jnp.zeros((batch, num_kv_heads, slots, head_dim), dtype)
    return SinkWindowCache(sink, sink, ring, ring, jnp.zeros(batch, jnp.int32))

  def prefill(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: SinkWindowMetadata,
    *,
    max_length: int,
  ) -> tuple[Float[Array, "B L H D"], SinkWindowCache]:
    """Attends over right-padded prompts and stores their first and last tokens."""
    B, L, N, D = k_BxLxNxD.shape
    o_BxLxHxD = self.attend(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, metadata)
    empty = self.init_cache(B, max_length, N, D, k_BxLxNxD.dtype)
    length_B = metadata.documents.row_length
    S, W = empty.sink_key.shape[2], empty.ring_key.shape[2]
    held_BxW = _last_in_slot(length_B - S, W)
    ring_BxW = jnp.where(held_BxW >= 0, held_BxW + S, L)
    sink_BxS = jnp.broadcast_to(jnp.arange(S)[None], (B, S))
    return o_BxLxHxD, SinkWindowCache(
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
    cache: SinkWindowCache,
    layer: Int[Array, ""],
  ) -> tuple[Float[Array, "B H D"], SinkWindowCache]:
    """Replaces the token that leaves the window by the new one, and attends to the cache."""
    (B, H, D), N = q_BxHxD.shape, k_BxNxD.shape[1]
    S, W = cache.sink_key.shape[-2], cache.ring_key.shape[-2]
    position_B = cache.length[layer]
    # A slot beyond the array's end is not written.
    sink_B = jnp.where(position_B < S, position_B, S)
    ring_B = jnp.where(position_B < S, W, (position_B - S) % max(W, 1))
    row_B = jnp.arange(B)

    def put(array: Array, slot_B: Array, token_BxNxD: Array) -> Array:
      return array.at[layer, row_B, :, slot_B].set(token_BxNxD, mode="drop")

    cache = SinkWindowCache(
      sink_key=put(cache.sink_key, sink_B, k_BxNxD),
      sink_value=put(cache.sink_value, sink_B, v_BxNxD),
      ring_key=put(cache.ring_key, ring_B, k_BxNxD),
      ring_value=put(cache.ring_value, ring_B, v_BxNxD),
      length=cache.length.at[layer].add(1),
    )
    sink_BxS, slot_W = jnp.arange(S)[None], jnp.arange(W)
    key_BxSxNxD = self._rotate(cache.sink_key[layer].swapaxes(1, 2), position_B[:, None], sink_BxS)
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
    """The slice of the row that contains the windows of a block of queries."""
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
    position_Bxb = start + jnp.arange(block)[None] - start_Bxb  # in the document
    index_BxbS = (start_Bxb[..., None] + sink_1x1xS).reshape(B, -1)
    shape = (B, block, self.sinks, *row.key.shape[2:])
    key, value = (take_positions(x, index_BxbS).reshape(shape) for x in (row.key, row.value))
    visible_BxbxS = (sink_1x1xS <= position_Bxb[..., None]) & token_Bxb[..., None]
    return _Source(self._rotate(key, position_Bxb[..., None], sink_1x1xS), value, visible_BxbxS)

  def _rotate(self, key: Array, query_position: Array, sink: Array) -> Array:
    """Keys of sinks [..., S, N, D] at the distance at which a query sees them."""
    if self.sink_distance == "in_cache":
      ahead = query_position - (self.sinks + self.window - 1) + 0 * sink
    elif self.sink_distance == "at_most_window":
      ahead = query_position - sink - self.window
    else:
      return key
    table = rope_table(jnp.maximum(ahead, 0).reshape(1, -1), np.array(self.inverse_frequencies))
    return apply_rope(key.reshape(1, -1, *key.shape[-2:]), table).reshape(key.shape)


class _Row(NamedTuple):
  """What every block of queries reads, padded to whole blocks, P tokens."""

  key: Float[Array, "B P N D"]
  value: Float[Array, "B P N D"]
  start: Int[Array, "B P"]
  is_token: Bool[Array, "B P"]


@dataclasses.dataclass(frozen=True)
class _Source:
  """Keys that a block of b queries may see; T is b where each query has its own keys, else 1."""

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


def padded_length(length: int) -> int:
  """P, the length of rows padded to whole blocks of queries."""
  block = min(BLOCK_Q, length)
  return math.ceil(length / block) * block


def _pad(x_BxL: Array, length: int) -> Array:
  """Zeros (False) to the right, up to `length`."""
  return jnp.pad(x_BxL, ((0, 0), (0, length - x_BxL.shape[1])) + ((0, 0),) * (x_BxL.ndim - 2))


def _last_in_slot(count_B: Array, size: int) -> Int[Array, "B W"]:
  """The last of items 0 … count − 1 that each slot of a ring of `size` slots holds; −1 for none."""
  slot_W = jnp.arange(size)
  turns_BxW = (count_B[:, None] - 1 - slot_W[None]) // max(size, 1)
  return jnp.where(turns_BxW >= 0, slot_W[None] + size * turns_BxW, -1)
