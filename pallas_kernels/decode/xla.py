"""Decode attention in plain XLA. Runs anywhere, and is the kernels' oracle."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode.cache_arrays import CacheMask, GroupBias
from pallas_kernels.masks import masked_softmax


def decode_attention_xla(
  query_BxHxD: Float[Array, "B H D"],
  compact_key: Float[Array, "layers B N C D"],
  compact_value: Float[Array, "layers B N C D"],
  raw_key: Float[Array, "layers B N W D"],
  raw_value: Float[Array, "layers B N W D"],
  layer: Int[Array, ""] | int,
  visible: CacheMask,
  *,
  scale: float,
  group_bias: GroupBias | None,
) -> Float[Array, "B H D"]:
  """See `decode_attention`."""
  B, H, D = query_BxHxD.shape
  (N, C), W = compact_key.shape[-3:-1], raw_key.shape[-2]
  q_BxNxRxD = query_BxHxD.reshape(B, N, H // N, D)
  logits_BxNxRxS = scale * jnp.concatenate(
    [
      jnp.einsum("bnrd,bnsd->bnrs", q_BxNxRxD, key[layer], preferred_element_type=jnp.float32)
      for key in (compact_key, raw_key)
    ],
    axis=-1,
  )
  if group_bias is not None:
    bias_BxS = jnp.pad(group_bias.of(C), ((0, 0), (0, W)))
    logits_BxNxRxS += bias_BxS[:, None, None]
  mask_BxS = visible.mask(C, W)
  weights = masked_softmax(logits_BxNxRxS, mask_BxS[:, None, None]).astype(query_BxHxD.dtype)
  out_BxNxRxD = _weighted(weights[..., :C], compact_value[layer])
  out_BxNxRxD += _weighted(weights[..., C:], raw_value[layer])
  return out_BxNxRxD.reshape(B, H, D).astype(query_BxHxD.dtype)


def _weighted(weights_BxNxRxS: Array, value_BxNxSxD: Array) -> Float[Array, "B N R D"]:
  return jnp.einsum(
    "bnrs,bnsd->bnrd", weights_BxNxRxS, value_BxNxSxD, preferred_element_type=jnp.float32
  )
