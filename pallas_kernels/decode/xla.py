"""Decode attention in plain XLA. Runs on any device, and is the oracle of the kernels."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode.cache_arrays import CacheArrays, GroupBias
from pallas_kernels.decode.cache_layout import CacheMask
from pallas_kernels.masks import masked_softmax
from pallas_kernels.products import einsum_float32


def decode_attention_xla(
  query_BxHxD: Float[Array, "B H D"],
  cache: CacheArrays,
  layer: Int[Array, ""] | int,
  mask: CacheMask,
  *,
  scale: float,
  group_bias: GroupBias | None,
) -> Float[Array, "B H D"]:
  """See `decode_attention`."""
  B, H, D = query_BxHxD.shape
  (N, C), W = cache.compact_key.shape[-3:-1], cache.raw_key.shape[-2]
  q_BxNxRxD = query_BxHxD.reshape(B, N, H // N, D)
  logits_BxNxRxS = scale * jnp.concatenate(
    [
      einsum_float32("bnrd,bnsd->bnrs", q_BxNxRxD, key[layer])
      for key in (cache.compact_key, cache.raw_key)
    ],
    axis=-1,
  )
  if group_bias is not None:
    bias_BxS = jnp.pad(group_bias.of_entries(C), ((0, 0), (0, W)))
    logits_BxNxRxS += bias_BxS[:, None, None]
  visible_BxS = visible_entries(mask, C, W)
  weights = masked_softmax(logits_BxNxRxS, visible_BxS[:, None, None]).astype(query_BxHxD.dtype)
  out_BxNxRxD = einsum_float32("bnrs,bnsd->bnrd", weights[..., :C], cache.compact_value[layer])
  out_BxNxRxD += einsum_float32("bnrs,bnsd->bnrd", weights[..., C:], cache.raw_value[layer])
  return out_BxNxRxD.reshape(B, H, D).astype(query_BxHxD.dtype)


def visible_entries(mask: CacheMask, compact: int, raw: int) -> Bool[Array, "B S"]:
  """Which of the compact entries, then of the raw slots, each sequence sees."""
  mask_Bx1 = CacheMask(*(bound_B[:, None] for bound_B in mask))
  return jnp.concatenate(
    [
      mask_Bx1.sees_entry(jnp.arange(compact, dtype=jnp.int32)[None]),
      mask_Bx1.sees_slot(jnp.arange(raw, dtype=jnp.int32)[None]),
    ],
    axis=1,
  )
