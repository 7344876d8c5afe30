"""Importance of keys where the sequence is split over devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dga_jax.attention.context_parallel.zigzag import ZigzagShards
from dga_jax.attention.scores import SampledQueries
from pallas_kernels.gather import take_positions
from pallas_kernels.products import einsum_float32


def sharded_importance_scores(
  query: Float[Array, "B P H D"],
  key: Float[Array, "B P N D"],
  samples: SampledQueries,
  shards: ZigzagShards,
) -> Float[Array, "B N L"]:
  """`importance_scores` of the whole sequence, the same on every device.

  Sampled queries, a few tokens, are fetched from the devices that hold them. Each device scores
  its own keys, under a softmax whose sums run over all devices. The scores, one number a key, are
  gathered.

  Args:
    query: the tokens of this device.
    key: the tokens of this device.
    samples: the sampled queries of the whole sequence.
    shards: the tokens that each device holds.
  """
  query, key = jax.lax.stop_gradient((query, key))
  position_1x1xP = shards.positions[None, None]

  def of_document(samples_BxS: SampledQueries) -> Array:
    q_BxSxHxD = take_positions(query, shards.local_index(samples_BxS.position))
    q_BxSxHxD = jax.lax.psum(q_BxSxHxD, shards.axis_name)
    start_BxSx1, end_BxSx1 = samples_BxS.start[..., None], samples_BxS.end[..., None]
    sees_BxSxP = (start_BxSx1 <= position_1x1xP) & (position_1x1xP < end_BxSx1)
    return _local_scores(q_BxSxHxD, key, sees_BxSxP, shards.axis_name)

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
  return shards.all_gather(scores_Bx2xNxn).swapaxes(1, 2).reshape(B, N, shards.length)


def _local_scores(
  q_BxSxHxD: Float[Array, "B S H D"],
  k_BxPxNxD: Float[Array, "B P N D"],
  sees_BxSxP: Bool[Array, "B S P"],
  axis_name: str,
) -> Float[Array, "B N P"]:
  """Attention of the queries to this device's keys, normalized over the keys of all devices.

  The logits of one KV head exist at a time.
  """
  B, S, H, D = q_BxSxHxD.shape
  N = k_BxPxNxD.shape[2]

  def logits(head: tuple[Array, Array]) -> Array:
    q_BxSxRxD, k_BxPxD = head
    logits_BxRxSxP = einsum_float32("bsrd,bpd->brsp", q_BxSxRxD, k_BxPxD) / jnp.sqrt(jnp.float32(D))
    return jnp.where(sees_BxSxP[:, None], logits_BxRxSxP, -jnp.inf)

  def exp_logits(head: tuple[Array, Array], m_BxRxS: Array) -> Array:
    return jnp.exp(logits(head) - m_BxRxS[..., None])

  heads = (jnp.moveaxis(q_BxSxHxD.reshape(B, S, N, H // N, D), 2, 0), jnp.moveaxis(k_BxPxNxD, 2, 0))
  m_NxBxRxS = jax.lax.map(lambda head: logits(head).max(axis=-1), heads)
  m_NxBxRxS = jax.lax.pmax(m_NxBxRxS, axis_name)
  m_NxBxRxS = jnp.where(jnp.isneginf(m_NxBxRxS), 0, m_NxBxRxS)
  l_NxBxRxS = jax.lax.map(lambda x: exp_logits(*x).sum(axis=-1), (heads, m_NxBxRxS))
  l_NxBxRxS = jax.lax.psum(l_NxBxRxS, axis_name)
  l_NxBxRxS = jnp.where(l_NxBxRxS == 0, 1, l_NxBxRxS)

  def of_head(x: tuple[tuple[Array, Array], Array, Array]) -> Array:
    head, m_BxRxS, l_BxRxS = x
    return (exp_logits(head, m_BxRxS) / l_BxRxS[..., None]).sum(axis=(1, 2))

  scores_NxBxP = jax.lax.map(of_head, (heads, m_NxBxRxS, l_NxBxRxS))
  return jnp.moveaxis(scores_NxBxP, 0, 1) / jnp.maximum(1, sees_BxSxP.sum(axis=1))[:, None]
