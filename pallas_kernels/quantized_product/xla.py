"""The product with weights in 8 bits in plain XLA. Runs on any device, and is the oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.products import einsum_float32
from pallas_kernels.rms_norm.equation import rms_norm_xla


def quantized_product_xla(
  x_BxK: Float[Array, "B K"],
  numbers_TxK: Shaped[Array, "T K"],
  scale_T: Float[Array, "T"],
  *,
  norm_scale: Float[Array, "K"] | None,
  epsilon: float,
  swiglu: bool,
  residual: Float[Array, "B U"] | None,
) -> Float[Array, "B U"]:
  """See `quantized_product`."""
  dtype = x_BxK.dtype
  if norm_scale is not None:
    _, x_BxK = rms_norm_xla(x_BxK, norm_scale, epsilon=epsilon)
  product_BxT = einsum_float32("BK,TK->BT", x_BxK, numbers_TxK.astype(dtype))
  out = (product_BxT * scale_T[None]).astype(dtype)
  if swiglu:
    gate_BxU, up_BxU = jnp.split(out, 2, axis=1)
    out = jax.nn.silu(gate_BxU) * up_BxU
  return out if residual is None else residual + out
