"""The normalisation before a product, which all implementations compute in XLA."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
  x_BxK: Float[Array, "B K"], scale_K: Float[Array, "K"], epsilon: float
) -> Float[Array, "B K"]:
  """x/√(mean x² + ε)·scale, computed in float32, in the dtype of x."""
  wide_BxK = x_BxK.astype(jnp.float32)
  mean_Bx1 = jnp.mean(wide_BxK * wide_BxK, axis=1, keepdims=True)
  normed_BxK = wide_BxK * jax.lax.rsqrt(mean_Bx1 + epsilon) * scale_K.astype(jnp.float32)[None]
  return normed_BxK.astype(x_BxK.dtype)
