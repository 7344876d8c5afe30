"""Importance of keys where the sequence is split over devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dga_jax.attention.context_parallel.zigzag import ZigzagShards
from dga_jax.attention.plan import Rows
from dga_jax.attention.scores import sample_queries
from dga_jax.config import DGAConfig
from pallas_kernels.gather import take_positions


def sharded_importance_scores(
  query: Float[Array, "B P H D"],
  key: Float[Array, "B P N D"],
  rows: Rows,
  pieces: ZigzagShards,
  config: DGAConfig,
) -> Float[Array, "B N L"]:
  """`importance_scores` of the whole sequence, the same on every device.

  Sampled queries, a few tokens, are fetched from the devices that have them. Each device scores
  its own keys, under a softmax whose sums are taken over all devices, and the scores, one number
  a key, are gathered.
  """
  query, key = jax.lax.stop_gradient((query, key))
  documents = rows.documents
  samples = min(pieces.length, config.n_recent + config.n_random)
  start_BxC, _ = documents.extents(rows.max_documents)

  def of_document(document: Array | int) -> Array:
    sample_BxS, drawn_BxS = sample_queries(documents, documents.index == document, samples, config)
    start_Bx1 = jax.lax.dynamic_slice_in_dim(start_BxC, document, 1, axis=1)
    end_BxS = jnp.where(drawn_BxS, sample_BxS + 1, 0)
    place_BxS = pieces.place(sample_BxS)
    q_BxSxHxD = take_positions(query, place_BxS)
    q_BxSxHxD = jax.lax.psum(q_BxSxHxD, pieces.axis_name)
    sees_BxSxP = (start_Bx1[:, :, None] <= pieces.positions[None, None]) & (
      pieces.positions[None, None] < end_BxS[:, :, None]
    )
    return _scores(q_BxSxHxD, key, sees_BxSxP, pieces.axis_name)

  scores_BxNxP = of_document(0)
  if rows.max_documents > 1:
    scores_BxNxP = jax.lax.fori_loop(
      1, rows.max_documents, lambda i, scores: scores + of_document(i), scores_BxNxP
    )
  B, N, _ = scores_BxNxP.shape
  scores_Bx2xNxn = scores_BxNxP.reshape(B, N, 2, pieces.chunk).swapaxes(1, 2)
  return pieces.gather(scores_Bx2xNxn).swapaxes(1, 2).reshape(B, N, pieces.length)


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
