"""The products of a decoder layer for a few rows in plain XLA. Runs on any device; the oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.decode.products import norm_input, NormInput


def add_product_xla(
  x_BxE: Float[Array, "B E"],
  y_BxF: Float[Array, "B F"],
  weight_FxE: Float[Array, "F E"],
  scale_E: Float[Array, "E"],
) -> tuple[Float[Array, "B E"], NormInput]:
  """See `add_product`."""
  sum_BxE = (x_BxE.astype(jnp.float32) + _product(y_BxF, weight_FxE)).astype(x_BxE.dtype)
  return sum_BxE, norm_input(sum_BxE, scale_E)


def normed_swiglu_xla(
  x: NormInput,
  gate_ExF: Float[Array, "E F"],
  up_ExF: Float[Array, "E F"],
  *,
  epsilon: float,
) -> Float[Array, "B F"]:
  """See `normed_swiglu`."""
  gate_BxF, up_BxF = (_normed_product(x, weight, epsilon) for weight in (gate_ExF, up_ExF))
  return (jax.nn.silu(gate_BxF) * up_BxF).astype(x.scaled.dtype)


def normed_qkv_xla(
  x: NormInput,
  query_ExHD: Float[Array, "E HD"],
  key_ExND: Float[Array, "E ND"],
  value_ExND: Float[Array, "E ND"],
  cos_BxC: Float[Array, "B C"],
  sin_BxC: Float[Array, "B C"],
  *,
  epsilon: float,
) -> tuple[Float[Array, "B HD"], Float[Array, "B ND"], Float[Array, "B ND"]]:
  """See `normed_qkv`."""
  cos_Bx1xC, sin_Bx1xC = cos_BxC[:, None], sin_BxC[:, None]

  def rotate(product_BxHD: Array) -> Array:
    heads_BxHxD = product_BxHD.reshape(len(product_BxHD), -1, 2 * cos_BxC.shape[1])
    x1, x2 = jnp.split(heads_BxHxD, 2, axis=-1)
    pair = (x1 * cos_Bx1xC - x2 * sin_Bx1xC, x2 * cos_Bx1xC + x1 * sin_Bx1xC)
    return jnp.concatenate(pair, axis=-1).reshape(product_BxHD.shape)

  query, key, value = (
    _normed_product(x, weight, epsilon) for weight in (query_ExHD, key_ExND, value_ExND)
  )
  dtype = x.scaled.dtype
  return rotate(query).astype(dtype), rotate(key).astype(dtype), value.astype(dtype)


def _product(x: Array, weight: Array) -> Array:
  return jnp.einsum("BK,KN->BN", x, weight, preferred_element_type=jnp.float32)


def _normed_product(x: NormInput, weight: Array, epsilon: float) -> Array:
  mean_B = jnp.sum(x.squares, axis=0) / x.scaled.shape[1]
  return _product(x.scaled, weight) * jax.lax.rsqrt(mean_B + epsilon)[:, None]
