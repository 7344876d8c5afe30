"""k-means on a device with static shapes, for baselines that cluster keys."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Metric = Literal["cosine", "euclidean"]


def k_means(
  x_SxD: Float[Array, "S D"],
  is_point_S: Bool[Array, "S"],
  clusters: Int[Array, ""],
  *,
  most_clusters: int,
  metric: Metric,
  iterations: int,
) -> Float[Array, "C D"]:
  """Centroids by Lloyd's algorithm.

  The first centroids are points at evenly spaced ranks among the points, so that results repeat. A
  centroid is the mean of the points that are nearest to it; one without points stays.

  Args:
    x_SxD: vectors; S points and padding.
    is_point_S: False for padding.
    clusters: how many centroids are used, at most C.
    most_clusters: C.
    metric: "cosine" for the highest cosine similarity, "euclidean" for the smallest distance.
    iterations: of assignment and update.

  Returns:
    float32; the centroids from `clusters` on have no meaning.
  """
  x_SxD = x_SxD.astype(jnp.float32)
  points = is_point_S.sum()
  rank_C = jnp.arange(most_clusters) * points // jnp.maximum(clusters, 1)
  (index_S,) = jnp.nonzero(is_point_S, size=len(is_point_S), fill_value=0)
  centroids_CxD = x_SxD[index_S[jnp.minimum(rank_C, len(is_point_S) - 1)]]

  def update(_: Array, centroids_CxD: Array) -> Array:
    nearest_S = nearest_centroid(x_SxD, centroids_CxD, clusters, metric)
    is_member_CxS = (nearest_S[None] == jnp.arange(most_clusters)[:, None]) & is_point_S[None]
    count_C = is_member_CxS.sum(axis=1)
    sum_CxD = jnp.where(is_member_CxS, 1.0, 0.0) @ x_SxD
    mean_CxD = sum_CxD / jnp.maximum(count_C, 1)[:, None]
    return jnp.where((count_C > 0)[:, None], mean_CxD, centroids_CxD)

  return jax.lax.fori_loop(0, iterations, update, centroids_CxD)


def nearest_centroid(
  x_SxD: Float[Array, "S D"],
  centroids_CxD: Float[Array, "C D"],
  clusters: Int[Array, ""],
  metric: Metric,
) -> Int[Array, "S"]:
  """The nearest of the first `clusters` centroids; ties: the earlier one."""
  x_SxD = x_SxD.astype(jnp.float32)
  products_SxC = x_SxD @ centroids_CxD.T
  if metric == "cosine":
    norm_C = jnp.linalg.norm(centroids_CxD, axis=-1)
    closeness_SxC = products_SxC / jnp.maximum(norm_C, 1e-30)[None]
  else:
    closeness_SxC = 2 * products_SxC - (centroids_CxD**2).sum(axis=-1)[None]
  is_used_C = jnp.arange(len(centroids_CxD)) < clusters
  return jnp.where(is_used_C[None], closeness_SxC, -jnp.inf).argmax(axis=-1)
