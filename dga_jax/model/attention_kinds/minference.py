"""MInference (Jiang et al., arXiv 2407.02490): a sparse prefill, then dense decoding."""

import dataclasses
import math
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dga_jax.attention.segments import Documents
from dga_jax.model.attention_kinds.baseline_settings import BaselineSettings
from dga_jax.model.attention_kinds.dense_cache import DenseCacheAttention
from pallas_kernels.masks import masked_softmax
from pallas_kernels.products import einsum_float32

BLOCK_Q = 128


@dataclasses.dataclass(frozen=True)
class MInferenceConfig(BaselineSettings):
  """MInference (Jiang et al., arXiv 2407.02490) with its vertical-slash pattern in every head.

  It saves work in the prompt alone: the cache and decoding are dense. The paper searches the sizes
  for each head of a model; the defaults are those of its code without a search.

  Attributes:
    vertical: the number of keys that all queries of a head see.
    slash: the number of distances between query and key at which all queries of a head see.
    last_queries: the number of last queries that choose both.
    first_tokens: the number of first keys that are always chosen.
    recent_distances: the number of smallest distances that are always chosen.
  """

  vertical: int = 1000
  slash: int = 6096
  last_queries: int = 64
  first_tokens: int = 30
  recent_distances: int = 100

  _LEAST: ClassVar = {"vertical": 1, "slash": 1, "last_queries": 1, "recent_distances": 1}

  def __post_init__(self) -> None:
    super().__post_init__()
    for name, whole in (("first_tokens", "vertical"), ("recent_distances", "slash")):
      if getattr(self, name) > getattr(self, whole):
        raise ValueError(
          f"MInferenceConfig.{name} is {getattr(self, name)}; it must be at most"
          f" {whole}={getattr(self, whole)}, which it is part of."
        )

  def with_budget(self, keys: int) -> Self:
    """Vertical and slash sizes that sum to `keys`, in the same ratio.

    This bounds the keys that a query attends to; the cache stays dense.
    """
    vertical = max(1, round(keys * self.vertical / (self.vertical + self.slash)))
    slash = keys - vertical
    first, recent = min(self.first_tokens, vertical), min(self.recent_distances, slash)
    changes = {"first_tokens": first, "recent_distances": recent}
    return self._with_budget(keys, 2, vertical=vertical, slash=slash, **changes)


@dataclasses.dataclass(frozen=True)
class MInferenceAttention(DenseCacheAttention):
  """See `MInferenceConfig`. The last queries choose, so it is not causal over a whole sequence."""

  name = "minference"
  one_document = True  # Packed documents have no common last queries.

  settings: MInferenceConfig

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: Documents,
  ) -> Float[Array, "B L H D"]:
    """Attention to the keys and distances that the last queries choose; padding outputs 0."""
    B, L, H, D = q_BxLxHxD.shape
    N = k_BxLxNxD.shape[2]
    length_B = metadata.row_length
    vertical_BxHxL, slash_BxHxL = vertical_and_slash(q_BxLxHxD, k_BxLxNxD, length_B, self.settings)
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


def vertical_and_slash(
  q_BxLxHxD: Float[Array, "B L H D"],
  k_BxLxNxD: Float[Array, "B L N D"],
  length_B: Int[Array, "B"],
  settings: MInferenceConfig,
) -> tuple[Bool[Array, "B H L"], Bool[Array, "B H L"]]:
  """The keys, and the distances between query and key, that the queries of each head see.

  With Â the causal attention of the row's last queries, these are the `vertical` keys j with the
  largest Σ_q Â[q, j] and the `slash` distances with the largest Σ_q Â[q, pos(q) − distance].
  """
  _, L, H, _ = q_BxLxHxD.shape
  Q = min(settings.last_queries, L)
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
  vertical_BxHxL = jnp.where(i_1x1xL < settings.first_tokens, jnp.inf, paid_BxHxQxL.sum(axis=2))
  slash_BxHxL = jnp.where(i_1x1xL < settings.recent_distances, jnp.inf, slash_BxHxL)
  return _largest(vertical_BxHxL, settings.vertical), _largest(slash_BxHxL, settings.slash)


def _largest(score_BxHxL: Array, count: int) -> Bool[Array, "B H L"]:
  """The `count` largest of each head, ties to the earlier."""
  L = score_BxHxL.shape[-1]
  _, index = jax.lax.top_k(score_BxHxL, min(count, L))
  none = jnp.zeros(score_BxHxL.shape, bool)
  return jnp.put_along_axis(none, index, jnp.ones_like(index, bool), axis=-1, inplace=False)


def _logits(q_BxQxHxD: Array, k_BxLxNxD: Array) -> Float[Array, "B H Q L"]:
  B, Q, H, D = q_BxQxHxD.shape
  L, N = k_BxLxNxD.shape[1:3]
  logits_BxNxRxQxL = D**-0.5 * einsum_float32(
    "bqnrd,blnd->bnrql", q_BxQxHxD.reshape(B, Q, N, H // N, D), k_BxLxNxD
  )
  return logits_BxNxRxQxL.reshape(B, H, Q, L)
