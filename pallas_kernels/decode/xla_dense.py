"""One decoding step of dense attention in plain XLA: any device, and the kernel's oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode.cache_arrays import TokenRows
from pallas_kernels.products import einsum_float32


def dense_step_xla(
  query_BxHxD: Float[Array, "B H D"],
  key_BxNxD: Float[Array, "B N D"],
  value_BxNxD: Float[Array, "B N D"],
  tokens: TokenRows,
  length: Int[Array, "layers B"],
  layer: Int[Array, ""] | int,
  *,
  scale: float,
) -> tuple[Float[Array, "B H D"], TokenRows, Int[Array, "layers B"]]:
  """See `dense_step`."""
  (B, H, D), N = query_BxHxD.shape, key_BxNxD.shape[1]
  row_B, end_B = jnp.arange(B), length[layer]
  rows = TokenRows.pack(key_BxNxD, value_BxNxD, tokens.key.dtype)
  tokens = tokens.write((layer, row_B, slice(None), end_B), rows)
  k_BxNxMxD, v_BxNxMxD = tokens.layer(layer).unpack(query_BxHxD.dtype)
  q_BxNxRxD = query_BxHxD.reshape(B, N, H // N, D)
  s_BxNxRxM = scale * einsum_float32("BNRD,BNMD->BNRM", q_BxNxRxD, k_BxNxMxD)
  is_token_BxM = jnp.arange(k_BxNxMxD.shape[2])[None, :] <= end_B[:, None]
  w_BxNxRxM = jax.nn.softmax(jnp.where(is_token_BxM[:, None, None], s_BxNxRxM, -jnp.inf))
  o_BxNxRxD = jnp.einsum("BNRM,BNMD->BNRD", w_BxNxRxM.astype(v_BxNxMxD.dtype), v_BxNxMxD)
  return o_BxNxRxD.reshape(B, H, D), tokens, length.at[layer].add(1)
