"""ClusterKV (Liu et al., arXiv 2412.03213): a query reads clusters of similar keys."""

import dataclasses
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from dga_jax.model.attention_kinds.baseline_settings import BaselineSettings
from dga_jax.model.attention_kinds.k_means import k_means, nearest_centroid
from dga_jax.model.attention_kinds.token_selection import (
  HeadShape,
  mark_highest,
  PromptMemory,
  TokenSelectionAttention,
)

_INDEX_BITS = 32  # Of the position of a token in the list of its cluster.


@dataclasses.dataclass(frozen=True)
class ClusterKVConfig(BaselineSettings):
  """Clusters of the prompt's keys by cosine similarity, of which every query reads a few.

  k-means clusters the keys after the first `sinks`. A query head orders clusters by q·centroid and
  reads their tokens until budget − sinks tokens are read; the last cluster is cut after its earlier
  tokens. All tokens stay. Sinks and the tokens that follow the prompt are read by every query, as
  in the authors' evaluation: the clustering of new tokens, after every 320 in the paper, is left
  out. Centroids start at evenly spaced keys, where the paper draws them.

  Attributes:
    budget: tokens of the prompt that a query head reads, sinks included.
    sinks: first tokens.
    tokens_per_cluster: tokens of the prompt over clusters.
    iterations: of k-means.
    dense_layers: first layers, in which queries read all tokens.
  """

  budget: int = 1024
  sinks: int = 16
  tokens_per_cluster: int = 80
  iterations: int = 20
  dense_layers: int = 2

  _LEAST: ClassVar = {"budget": 1, "tokens_per_cluster": 1, "iterations": 1}

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.budget <= self.sinks:
      raise ValueError(
        f"ClusterKVConfig.budget is {self.budget}; it must be greater than sinks={self.sinks}."
      )

  def with_budget(self, keys: int) -> Self:
    """A query head reads at most `keys` tokens of the prompt."""
    return self._with_budget(keys, self.sinks + 1, budget=keys)

  def clusters(self, length: int) -> int:
    """Clusters of a prompt of `length` tokens."""
    return max(1, length // self.tokens_per_cluster)


class Clusters(NamedTuple):
  """The clusters of a prompt. While decoding, arrays have a leading axis of layers."""

  centroid: Float[Array, "*layers B N C D"]
  cluster: Int[Array, "*layers B N M"]  # of each token; −1 for tokens that are in none
  used: Int[Array, "*layers B"]  # clusters of each sequence


@dataclasses.dataclass(frozen=True)
class ClusterKVAttention(TokenSelectionAttention):
  """Dense attention over the prompt; decoding reads selected clusters."""

  name = "clusterkv"

  settings: ClusterKVConfig

  def init_index(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> Clusters:
    """No cluster."""
    count = self.settings.clusters(max_length)
    return Clusters(
      jnp.zeros((batch, num_kv_heads, count, head_dim), jnp.float32),
      jnp.full((batch, num_kv_heads, max_length), -1),
      jnp.zeros(batch, jnp.int32),
    )

  def index_prompt(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    length_B: Int[Array, "B"],
    *,
    max_length: int,
  ) -> Clusters:
    """Clusters the keys after the sinks."""
    settings, L = self.settings, k_BxLxNxD.shape[1]
    count_B = jnp.maximum(1, length_B // settings.tokens_per_cluster)
    i_L = jnp.arange(L)
    is_point_BxL = (i_L[None] >= settings.sinks) & (i_L[None] < length_B[:, None])

    def of_head(k_LxD: Array, is_point_L: Array, count: Array) -> tuple[Array, Array]:
      centroids = k_means(
        k_LxD,
        is_point_L,
        count,
        most_clusters=settings.clusters(max_length),
        metric="cosine",
        iterations=settings.iterations,
      )
      nearest_L = nearest_centroid(k_LxD, centroids, count, "cosine")
      return centroids, jnp.where(is_point_L, nearest_L, -1)

    of_row = jax.vmap(of_head, in_axes=(1, None, None))
    centroid, cluster_BxNxL = jax.vmap(of_row)(k_BxLxNxD, is_point_BxL, count_B)
    free = ((0, 0), (0, 0), (0, max_length - L))
    cluster = jnp.pad(cluster_BxNxL, free, constant_values=-1)
    return Clusters(centroid, cluster, count_B.astype(jnp.int32))

  def index_token(self, key_BxNxMxD: Array, position_B: Array, index: Clusters) -> Clusters:
    """A new token is in no cluster."""
    return index

  def select(
    self,
    q_BxNxRxD: Float[Array, "B N R D"],
    key_BxNxMxD: Float[Array, "B N M D"],
    position_B: Int[Array, "B"],
    index: Clusters,
    layer: Int[Array, ""],
  ) -> Bool[Array, "B N R M"]:
    """Tokens in no cluster, and those of the clusters with the highest products."""
    (B, N, R, _), M = q_BxNxRxD.shape, key_BxNxMxD.shape[2]
    product_BxNxRxC = jnp.einsum("bnrd,bncd->bnrc", q_BxNxRxD.astype(jnp.float32), index.centroid)
    is_used_BxC = jnp.arange(product_BxNxRxC.shape[-1])[None] < index.used[:, None]
    product_BxNxRxC = jnp.where(is_used_BxC[:, None, None], product_BxNxRxC, -jnp.inf)
    rank_BxNxRxC = jnp.argsort(jnp.argsort(-product_BxNxRxC, axis=-1), axis=-1)
    cluster_BxNxRxM = jnp.broadcast_to(index.cluster[:, :, None], (B, N, R, M))
    rank_BxNxRxM = jnp.take_along_axis(rank_BxNxRxC, jnp.maximum(cluster_BxNxRxM, 0), axis=-1)
    is_clustered = cluster_BxNxRxM >= 0
    # float32 holds the order of 2^24 tokens exactly; a rank is that of a token's cluster.
    order_BxNxRxM = jnp.argsort(jnp.argsort(rank_BxNxRxM, axis=-1, stable=True), axis=-1)
    score_BxNxRxM = jnp.where(is_clustered, -order_BxNxRxM.astype(jnp.float32), -jnp.inf)
    chosen = mark_highest(
      score_BxNxRxM.reshape(B, N * R, M), self.settings.budget - self.settings.sinks
    )
    is_dense = layer < self.settings.dense_layers
    return chosen.reshape(B, N, R, M) | ~is_clustered | is_dense

  def prompt_memory(self, length: int, layer: int, shape: HeadShape) -> PromptMemory:
    """All tokens, the centroids and the lists of the clusters are stored."""
    settings = self.settings
    if layer < settings.dense_layers:
      return PromptMemory(length, length)
    centroids = settings.clusters(length) / 2  # A centroid is a key without a value.
    lists = length * _INDEX_BITS / (2 * shape.head_dim * shape.bits)
    chosen = settings.sinks + shape.query_heads * (settings.budget - settings.sinks)
    return PromptMemory(length + centroids + lists, centroids + min(length, chosen))
