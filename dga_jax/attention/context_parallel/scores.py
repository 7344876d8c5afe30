"""Importance of keys where the sequence is split over devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dga_jax.attention.context_parallel.zigzag import ZigzagShards
from dga_jax.attention.scores import SampledQueries
from pallas_kernels.gather import take_positions


def sharded_importance_scores(
  query: Float[Array, "B P H D"],
  key: Float[Array, "B P N D"],
  samples: SampledQueries,
  shards: ZigzagShards,
) -> Float[Array, "B N L"]:
  """`importance_scores` of the whole sequence, the same on every device.

  Sampled queries, a few tokens, are fetched from the devices that hold them. Each device scores
  its own keys, under a softmax whose sums run over all devices, and the scores, one number a key,
  are gathered.
  """
  query, key = jax.lax.stop_gradient((query, key))
  position_1x1xP = shards.positions[None, None]

  def of_document(samples_BxS: SampledQueries) -> Array:
    q_BxSxHxD = take_positions(query, shards.place(samples_BxS.position))
    q_BxSxHxD = jax.lax.psum(q_BxSxHxD, shards.axis_name)
    start_BxSx1, end_BxSx1 = samples_BxS.start[..., None], samples_BxS.end[..., None]
    sees_BxSxP = (start_BxSx1 <= position_1x1xP) & (position_1x1xP < end_BxSx1)
    return _scores(q_BxSxHxD, key, sees_BxSxP, shards.axis_name)

  scores_BxNxP = of_document(samples.of_document(0))
  max_documents = samples.position.shape[1]
  if max_documents > 1:
    scores_BxNxP = jax.lax.fori_loop(
      1,
      max_documents,
      lambda document, scores: scores + of_document(samples.of_document(document)),
      scores_BxNxP,
    )
  B, N, _ = scores_BxNxP.shape
  scores_Bx2xNxn = scores_BxNxP.reshape(B, N, 2, shards.chunk).swapaxes(1, 2)
  return shards.gather(scores_Bx2xNxn).swapaxes(1, 2).reshape(B, N, shards.length)


def _scores(q_BxSxHxD: Array, key: Array, sees_BxSxP: Array, axis_name: str) -> Array:
  """[B, N, P]: what the queries pay to this device's keys; logits of one KV head at a time."""
  B, S, H, D = q_BxSxHxD.shape
  N = key.shape[2]

  def logits(heads: tuple[Array, Array]) -> Array:
    q_BxSxRxD, k_BxPxD = heads
    logits_BxRxSxP = jnp.einsum(
      "bsrd,bpd->brsp", q_BxSxRxD, k_BxPxD, preferred_element_type=jnp.float32
    ) / jnp.sqrt(jnp.float32(D))
    return jnp.where(sees_BxSxP[:, None], logits_BxRxSxP, -jnp.inf)

  heads = (jnp.moveaxis(q_BxSxHxD.reshape(B, S, N, H // N, D), 2, 0), jnp.moveaxis(key, 2, 0))
  top = jax.lax.map(lambda one: logits(one).max(axis=-1), heads)
  top = jax.lax.pmax(top, axis_name)
  top = jnp.where(jnp.isneginf(top), 0, top)

  def weights(one: tuple[tuple[Array, Array], Array]) -> Array:
    return jnp.exp(logits(one[0]) - one[1][..., None])

  total = jax.lax.map(lambda one: weights(one).sum(axis=-1), (heads, top))
  total = jax.lax.psum(total, axis_name)
  total = jnp.where(total == 0, 1, total)

  def paid(one: tuple[tuple[tuple[Array, Array], Array], Array]) -> Array:
    return (weights(one[0]) / one[1][..., None]).sum(axis=(1, 2))

  paid_NxBxP = jax.lax.map(paid, ((heads, top), total))
  return jnp.moveaxis(paid_NxBxP, 0, 1) / jnp.maximum(1, sees_BxSxP.sum(axis=1))[:, None]
