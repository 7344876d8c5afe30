"""Sinks and a window whose sinks are seen at another distance than the true one.

StreamingLLM and LM-Infinite differ in this distance. Keys carry RoPE at their true positions. A
rotation depends on the difference of positions alone, so rotating a sink's key further by the
difference changes its distance.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dga_jax.attention.segments import Documents
from dga_jax.model.attention_kinds.sink_window_cache import (
  attend_to_sources,
  KeySource,
  SinkWindowCacheAttention,
)
from dga_jax.model.rope import apply_rope, rope_table
from pallas_kernels.gather import take_positions

BLOCK_Q = 256

# The distance at which a query sees a sink: the one between their slots in the cache, whose tokens
# have no gaps; or the true one, at most the window's length.
SinkDistance = Literal["in_cache", "at_most_window"]


class PaddedRows(NamedTuple):
  """The rows, and two of their arrays padded to whole blocks of queries, P tokens."""

  documents: Documents
  start: Int[Array, "B P"]  # first position of the token's document
  is_token: Bool[Array, "B P"]


@dataclasses.dataclass(frozen=True)
class RotatedSinksAttention(SinkWindowCacheAttention):
  """Each query sees the first `sinks` tokens of its document and the last `window` others.

  Attributes:
    sink_distance: see `SinkDistance`.
    inverse_frequencies: ω [D/2] of the model's RoPE, which rotates sinks.
  """

  sink_distance: SinkDistance = "in_cache"
  inverse_frequencies: tuple[float, ...] = ()

  def prepare(self, documents: Documents) -> PaddedRows:
    """Pads the rows to whole blocks of queries."""
    L = documents.index.shape[1]
    padded = padded_length(L)
    return PaddedRows(documents, _pad(documents.start, padded), _pad(documents.is_token, padded))

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: PaddedRows,
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
      o_BxbxNxRxD = attend_to_sources(q_BxbxHxD.reshape(B, block, N, H // N, D), sources)
      return o_BxbxNxRxD.reshape(B, block, H, D)

    o_TxBxbxHxD = jax.lax.map(attend_block, jnp.arange(0, padded, block))
    return jnp.moveaxis(o_TxBxbxHxD, 0, 1).reshape(B, padded, H, D)[:, :L]

  def _window_source(self, row: "_Row", start: Array, block: int) -> KeySource:
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
    return KeySource(key, value, visible_Bxbxs)

  def _sink_source(self, row: "_Row", start: Array, block: int) -> KeySource:
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
    return KeySource(self._place_sinks(key, position_Bxb), value, visible_BxbxS)

  def _place_sinks(self, key: Array, position_BxT: Int[Array, "B T"]) -> Array:
    """Keys of sinks [B, T or 1, S, N, D] at the distance at which each query sees them."""
    S = key.shape[2]
    key = jnp.broadcast_to(key, (*position_BxT.shape, *key.shape[2:]))
    sink_1x1xS = jnp.arange(S)[None, None]
    if self.sink_distance == "in_cache":
      ahead = position_BxT[..., None] - (self.sinks + self.window - 1) + 0 * sink_1x1xS
    else:
      ahead = position_BxT[..., None] - sink_1x1xS - self.window
    table = rope_table(jnp.maximum(ahead, 0).reshape(1, -1), np.array(self.inverse_frequencies))
    return apply_rope(key.reshape(1, -1, *key.shape[-2:]), table).reshape(key.shape)


class _Row(NamedTuple):
  """What every block of queries reads, padded to whole blocks, P tokens."""

  key: Float[Array, "B P N D"]
  value: Float[Array, "B P N D"]
  start: Int[Array, "B P"]
  is_token: Bool[Array, "B P"]


def padded_length(length: int) -> int:
  """P, the length of rows padded to whole blocks of queries."""
  block = min(BLOCK_Q, length)
  return math.ceil(length / block) * block


def _pad(x_BxL: Array, length: int) -> Array:
  """Zeros (False) to the right, up to `length`."""
  return jnp.pad(x_BxL, ((0, 0), (0, length - x_BxL.shape[1])) + ((0, 0),) * (x_BxL.ndim - 2))
