"""The products of a decoder layer for a few rows in plain XLA. Runs on any device; the oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def add_product_xla(
  x_BxE: Float[Array, "B E"], y_BxF: Float[Array, "B F"], weight_FxE: Float[Array, "F E"]
) -> Float[Array, "B E"]:
  """See `add_product`."""
  return x_BxE + jnp.einsum("BF,FE->BE", y_BxF, weight_FxE)


def normed_swiglu_xla(
  x_BxE: Float[Array, "B E"],
  scale_E: Float[Array, "E"],
  gate_ExF: Float[Array, "E F"],
  up_ExF: Float[Array, "E F"],
  *,
  epsilon: float,
) -> Float[Array, "B F"]:
  """See `normed_swiglu`."""
  y_BxE = _rms_norm(x_BxE, scale_E, epsilon)
  gate_BxF, up_BxF = (jnp.einsum("BE,EF->BF", y_BxE, weight) for weight in (gate_ExF, up_ExF))
  return jax.nn.silu(gate_BxF) * up_BxF


def normed_qkv_xla(
  x_BxE: Float[Array, "B E"],
  scale_E: Float[Array, "E"],
  query_ExHD: Float[Array, "E HD"],
  key_ExND: Float[Array, "E ND"],
  value_ExND: Float[Array, "E ND"],
  cos_BxC: Float[Array, "B C"],
  sin_BxC: Float[Array, "B C"],
  *,
  epsilon: float,
) -> tuple[Float[Array, "B HD"], Float[Array, "B ND"], Float[Array, "B ND"]]:
  """See `normed_qkv`."""
  y_BxE = _rms_norm(x_BxE, scale_E, epsilon)
  cos_Bx1xC, sin_Bx1xC = cos_BxC[:, None], sin_BxC[:, None]

  def rotated(weight: Array) -> Array:
    product = jnp.einsum("BE,EF->BF", y_BxE, weight)
    heads_BxHxD = product.reshape(len(product), -1, 2 * cos_BxC.shape[1])
    x1, x2 = jnp.split(heads_BxHxD.astype(jnp.float32), 2, axis=-1)
    pair = (x1 * cos_Bx1xC - x2 * sin_Bx1xC, x2 * cos_Bx1xC + x1 * sin_Bx1xC)
    return jnp.concatenate(pair, axis=-1).astype(product.dtype).reshape(product.shape)

  return rotated(query_ExHD), rotated(key_ExND), jnp.einsum("BE,EF->BF", y_BxE, value_ExND)


def _rms_norm(x_BxE: Array, scale_E: Array, epsilon: float) -> Array:
  wide_BxE = x_BxE.astype(jnp.float32)
  inverse_Bx1 = jax.lax.rsqrt(jnp.mean(wide_BxE * wide_BxE, axis=1, keepdims=True) + epsilon)
  return (wide_BxE * (inverse_Bx1 * scale_E.astype(jnp.float32)[None])).astype(x_BxE.dtype)
