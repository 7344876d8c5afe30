"""The oracle of grouped attention: ranges written out as masks. Slow and obvious.

No backend imports this file, and it imports no code of a backend.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.grouped_attention.kv_sources import HeadOrder, KVSources


def grouped_attention_reference(
  query: Float[Array, "B L H D"],
  sources: KVSources,
  *,
  scale: float,
  group_bias: float,
  max_window: int,
  head_order: HeadOrder | None = None,
) -> Float[Array, "B L H D"]:
  """See `grouped_attention`; holds B·H·L·S logits at once, S the tokens of all sources.

  Computes in float32, or in float64 for float64 arrays.
  """
  del head_order, max_window
  B, L, H, D = query.shape
  N = sources.focal.key.shape[2]
  wide = jnp.promote_types(query.dtype, jnp.float32)
  query_BxLxNxRxD = query.reshape(B, L, N, H // N, D).astype(wide)
  logits, visible, values = [], [], []
  for source, bias in zip(sources, (0.0, group_bias, 0.0), strict=True):
    key_BxSxNxD, value_BxSxNxD = (x.astype(wide) for x in (source.key, source.value))
    products = jnp.einsum("blnrd,bsnd->bnrls", query_BxLxNxRxD, key_BxSxNxD, precision="highest")
    logits.append(scale * products + bias)
    token_S = jnp.arange(key_BxSxNxD.shape[1])[None, None, None]
    visible_BxnxLxS = (source.start[..., None] <= token_S) & (token_S < source.end[..., None])
    visible.append(jnp.broadcast_to(visible_BxnxLxS[:, :, None], products.shape))
    values.append(value_BxSxNxD)
  logits_BxNxRxLxS = jnp.where(
    jnp.concatenate(visible, axis=-1), jnp.concatenate(logits, axis=-1), -jnp.inf
  )
  sees_BxNxRxLx1 = jnp.concatenate(visible, axis=-1).any(axis=-1, keepdims=True)
  # A query that sees nothing gets a softmax of zeros, which is then replaced by 0.
  weights = jax.nn.softmax(jnp.where(sees_BxNxRxLx1, logits_BxNxRxLxS, 0.0), axis=-1)
  weights_BxNxRxLxS = jnp.where(sees_BxNxRxLx1, weights, 0.0)
  out_BxLxNxRxD = jnp.einsum(
    "bnrls,bsnd->blnrd", weights_BxNxRxLxS, jnp.concatenate(values, axis=1), precision="highest"
  )
  return out_BxLxNxRxD.reshape(B, L, H, D).astype(query.dtype)
