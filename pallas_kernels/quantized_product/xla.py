"""The product with weights in 8 bits in plain XLA. Runs on any device, and is the oracle."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


def quantized_product_xla(
  x_BxK: Float[Array, "B K"], numbers_TxK: Shaped[Array, "T K"], scale_T: Float[Array, "T"]
) -> Float[Array, "B T"]:
  """See `quantized_product`."""
  product_BxT = jnp.einsum(
    "BK,TK->BT", x_BxK, numbers_TxK.astype(x_BxK.dtype), preferred_element_type=jnp.float32
  )
  return (product_BxT * scale_T[None]).astype(x_BxK.dtype)
