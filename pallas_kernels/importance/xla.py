"""Importance of keys in plain XLA, one KV head after the other. Runs anywhere."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.masks import in_range, masked_softmax
from pallas_kernels.products import einsum_float32


def sampled_importance_xla(
  query_BxSxHxD: Float[Array, "B S H D"],
  key_BxLxNxD: Float[Array, "B L N D"],
  start_BxS: Int[Array, "B S"],
  end_BxS: Int[Array, "B S"],
) -> Float[Array, "B N L"]:
  """See `sampled_importance`. Holds the logits of one KV head at a time."""
  B, S, H, D = query_BxSxHxD.shape
  L, N = key_BxLxNxD.shape[1:3]
  sees_BxSxL = in_range(L, start_BxS, end_BxS)

  def of_kv_head(heads: tuple[Array, Array]) -> Array:
    q_BxSxRxD, k_BxLxD = heads
    logits_BxRxSxL = einsum_float32("bsrd,bld->brsl", q_BxSxRxD, k_BxLxD) / jnp.sqrt(jnp.float32(D))
    weights_BxRxSxL = masked_softmax(logits_BxRxSxL, sees_BxSxL[:, None])
    count_BxL = jnp.maximum(1, sees_BxSxL.sum(axis=1))
    return weights_BxRxSxL.sum(axis=(1, 2)) / count_BxL.astype(jnp.float32)

  q_NxBxSxRxD = jnp.moveaxis(query_BxSxHxD.reshape(B, S, N, H // N, D), 2, 0)
  scores_NxBxL = jax.lax.map(of_kv_head, (q_NxBxSxRxD, jnp.moveaxis(key_BxLxNxD, 2, 0)))
  return jnp.moveaxis(scores_NxBxL, 0, 1)
