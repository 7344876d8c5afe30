"""MInference: a vertical-slash mask over the prompt, chosen by its last queries; a dense cache."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from dga_jax.model.attention_kinds.dense import DenseAttention, DenseCache
from dga_jax.model.baselines import MInferenceConfig
from pallas_kernels.masks import masked_softmax

BLOCK_Q = 128


@dataclasses.dataclass(frozen=True)
class MInferenceAttention:
  """See `MInferenceConfig`. The last queries choose, so it is not causal over a whole sequence."""

  config: MInferenceConfig

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    *,
    segment_ids: Int[Array, "B L"] | None,
    lengths: Int[Array, "B"] | None,
  ) -> Float[Array, "B L H D"]:
    """Attention to what the last queries of each row choose; padded queries give 0.

    Raises:
      ValueError: for packed documents, which have no common last queries.
    """
    if segment_ids is not None:
      raise ValueError(
        "segment_ids are given, but attention='minference' wants one document in each row."
      )
    B, L, H, D = q_BxLxHxD.shape
    N = k_BxLxNxD.shape[2]
    length_B = jnp.full(B, L) if lengths is None else lengths
    vertical_BxHxL, slash_BxHxL = vertical_and_slash(q_BxLxHxD, k_BxLxNxD, length_B, self.config)
    block = min(BLOCK_Q, L)
    padded = math.ceil(L / block) * block
    q_BxLxHxD = jnp.pad(q_BxLxHxD, ((0, 0), (0, padded - L), (0, 0), (0, 0)))

    @jax.checkpoint
    def attend_block(start: Array) -> Array:
      q_BxbxHxD = jax.lax.dynamic_slice_in_dim(q_BxLxHxD, start, block, axis=1)
      i_b = start + jnp.arange(block)
      distance_bxL = i_b[:, None] - jnp.arange(L)[None]
      slash_BxHxbxL = slash_BxHxL[:, :, jnp.clip(distance_bxL, 0, L - 1)]
      visible_BxHxbxL = vertical_BxHxL[:, :, None] | slash_BxHxbxL
      visible_BxHxbxL &= (distance_bxL >= 0)[None, None]
      visible_BxHxbxL &= (i_b[None] < length_B[:, None])[:, None, :, None]
      logits_BxHxbxL = _logits(q_BxbxHxD, k_BxLxNxD)
      w_BxHxbxL = masked_softmax(logits_BxHxbxL, visible_BxHxbxL).astype(q_BxbxHxD.dtype)
      w_BxNxRxbxL = w_BxHxbxL.reshape(B, N, H // N, block, L)
      o_BxbxNxRxD = jnp.einsum("bnrtl,blnd->btnrd", w_BxNxRxbxL, v_BxLxNxD)
      return o_BxbxNxRxD.reshape(B, block, H, D)

    o_TxBxbxHxD = jax.lax.map(attend_block, jnp.arange(0, padded, block))
    return jnp.moveaxis(o_TxBxbxHxD, 0, 1).reshape(B, padded, H, D)[:, :L]

  def init_cache(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> DenseCache:
    """An empty dense cache of one layer."""
    return DenseAttention().init_cache(batch, max_length, num_kv_heads, head_dim, dtype)

  def prefill(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    *,
    lengths: Int[Array, "B"] | None,
    max_length: int,
  ) -> tuple[Float[Array, "B L H D"], DenseCache]:
    """Attends sparsely over a right-padded prompt and stores all of it."""
    o_BxLxHxD = self.attend(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, segment_ids=None, lengths=lengths)
    cache = DenseCache.of_prompt(k_BxLxNxD, v_BxLxNxD, lengths=lengths, max_length=max_length)
    return o_BxLxHxD, cache

  def decode(
    self,
    q_BxHxD: Float[Array, "B H D"],
    k_BxNxD: Float[Array, "B N D"],
    v_BxNxD: Float[Array, "B N D"],
    cache: DenseCache,
    layer: Int[Array, ""],
  ) -> tuple[Float[Array, "B H D"], DenseCache]:
    """Dense decoding."""
    return DenseAttention().decode(q_BxHxD, k_BxNxD, v_BxNxD, cache, layer)


def vertical_and_slash(
  q_BxLxHxD: Float[Array, "B L H D"],
  k_BxLxNxD: Float[Array, "B L N D"],
  length_B: Int[Array, "B"],
  config: MInferenceConfig,
) -> tuple[Bool[Array, "B H L"], Bool[Array, "B H L"]]:
  """Which keys, and which distances between query and key, the queries of each head see.

  With Â the causal attention of the row's last queries: the `vertical` keys with the largest
  Σ_q Â[q, j], and the `slash` distances with the largest Σ_q Â[q, pos(q) − distance].
  """
  _, L, H, _ = q_BxLxHxD.shape
  Q = min(config.last_queries, L)
  position_BxQ = length_B[:, None] - Q + jnp.arange(Q)[None]
  q_BxQxHxD = jnp.take_along_axis(q_BxLxHxD, jnp.maximum(position_BxQ, 0)[:, :, None, None], axis=1)
  distance_BxQxL = position_BxQ[..., None] - jnp.arange(L)[None, None]
  seen_BxQxL = (distance_BxQxL >= 0) & (position_BxQ >= 0)[..., None]
  logits_BxHxQxL = _logits(q_BxQxHxD, k_BxLxNxD)
  paid_BxHxQxL = jax.lax.stop_gradient(masked_softmax(logits_BxHxQxL, seen_BxQxL[:, None]))
  index_BxQxL = jnp.where(seen_BxQxL, distance_BxQxL, L)

  def by_distance(paid_HxQxL: Array, index_QxL: Array) -> Array:
    total_HxL = jnp.zeros((H, L), jnp.float32)
    return total_HxL.at[:, index_QxL].add(paid_HxQxL, mode="drop")

  slash_BxHxL = jax.vmap(by_distance)(paid_BxHxQxL, index_BxQxL)
  i_1x1xL = jnp.arange(L)[None, None]
  vertical_BxHxL = jnp.where(i_1x1xL < config.first_tokens, jnp.inf, paid_BxHxQxL.sum(axis=2))
  slash_BxHxL = jnp.where(i_1x1xL < config.recent_distances, jnp.inf, slash_BxHxL)
  return _largest(vertical_BxHxL, config.vertical), _largest(slash_BxHxL, config.slash)


def _largest(score_BxHxL: Array, count: int) -> Bool[Array, "B H L"]:
  """The `count` largest of each head, ties to the earlier."""
  L = score_BxHxL.shape[-1]
  _, index = jax.lax.top_k(score_BxHxL, min(count, L))
  none = jnp.zeros(score_BxHxL.shape, bool)
  return jnp.put_along_axis(none, index, jnp.ones_like(index, bool), axis=-1, inplace=False)


def _logits(q_BxQxHxD: Array, k_BxLxNxD: Array) -> Float[Array, "B H Q L"]:
  B, Q, H, D = q_BxQxHxD.shape
  L, N = k_BxLxNxD.shape[1:3]
  logits_BxNxRxQxL = D**-0.5 * jnp.einsum(
    "bqnrd,blnd->bnrql",
    q_BxQxHxD.reshape(B, Q, N, H // N, D),
    k_BxLxNxD,
    preferred_element_type=jnp.float32,
  )
  return logits_BxNxRxQxL.reshape(B, H, Q, L)
