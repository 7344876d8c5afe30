"""The oracle of the kernels: ranges written out as masks, in float32. Slow and obvious."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.grouped_attention.kv_sources import KVSources


def grouped_attention_reference(
  query: Float[Array, "B L H D"],
  sources: KVSources,
  *,
  scale: float,
  group_bias: float,
  max_window: int,
) -> Float[Array, "B L H D"]:
  """See `grouped_attention`; holds B·H·L·(r + k + w) logits at once."""
  del max_window
  B, L, H, D = query.shape
  N = sources.focal.key.shape[2]
  q_BxLxNxRxD = query.reshape(B, L, N, H // N, D).astype(jnp.float32)
  key_BxSxNxD = jnp.concatenate([s.key for s in sources], axis=1).astype(jnp.float32)
  value_BxSxNxD = jnp.concatenate([s.value for s in sources], axis=1)
  visible_BxnxLxS = jnp.concatenate(
    [in_range(s.key.shape[1], s.start, s.end) for s in sources], axis=-1
  )
  bias_S = jnp.concatenate(
    [
      jnp.full(source.key.shape[1], bias)
      for source, bias in zip(sources, (0.0, group_bias, 0.0), strict=True)
    ]
  )
  logits_BxNxRxLxS = (
    scale * jnp.einsum("blnrd,bsnd->bnrls", q_BxLxNxRxD, key_BxSxNxD, precision="highest")
    + bias_S[None, None, None, None, :]
  )
  weights_BxNxRxLxS = masked_softmax(logits_BxNxRxLxS, visible_BxnxLxS[:, :, None])
  out_BxLxNxRxD = jnp.einsum(
    "bnrls,bsnd->blnrd",
    weights_BxNxRxLxS,
    value_BxSxNxD.astype(jnp.float32),
    precision="highest",
  )
  return out_BxLxNxRxD.reshape(B, L, H, D).astype(query.dtype)


def in_range(size: int, start: Array, end: Array) -> Array:
  """[..., size] bool: whether entry s lies in [start, end)."""
  entry = jnp.arange(size, dtype=jnp.int32).reshape((1,) * start.ndim + (size,))
  return (start[..., None] <= entry) & (entry < end[..., None])


def masked_softmax(
  logits: Float[Array, "*s n"], mask: Bool[Array, "*#s n"]
) -> Float[Array, "*s n"]:
  """Softmax over the last axis where the mask holds; 0 elsewhere and in rows without any."""
  logits = jnp.where(mask, logits, -jnp.inf)
  top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  weights = jnp.exp(logits - jnp.where(jnp.isneginf(top), 0, top))
  total = weights.sum(axis=-1, keepdims=True)
  return weights / jnp.where(total == 0, 1, total)
