"""RMSNorm with the residual sum in plain JAX.

XLA compiles it on any device. It is also the gradient of the kernel, and the norm before products
with weights in 8 bits. The tests compare both with float64 arithmetic.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm_xla(
  x: Float[Array, "*S E"],
  scale_E: Float[Array, "E"],
  *,
  epsilon: float,
  update: Float[Array, "*S E"] | None = None,
) -> tuple[Float[Array, "*S E"], Float[Array, "*S E"]]:
  """See `rms_norm`."""
  if update is not None:
    x = x + update
  wide = x.astype(jnp.float32)
  mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
  scale = jnp.expand_dims(scale_E.astype(jnp.float32), range(x.ndim - 1))
  return x, (wide * (jax.lax.rsqrt(mean + epsilon) * scale)).astype(x.dtype)
