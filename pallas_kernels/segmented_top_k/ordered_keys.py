"""Integers in the order of float32 scores, for selection bit by bit."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

LOWEST_KEY = -(2**31)  # no score has this key


def ordered_keys(scores: Float[Array, "*s"]) -> Int32[Array, "*s"]:
  """int32 keys in the order of float32 scores: −0.0 equals 0.0, and NaN is below −∞."""
  bits = lax.bitcast_convert_type(scores, jnp.int32)
  keys = jnp.where(bits < 0, jnp.int32(LOWEST_KEY) - bits, bits)
  return jnp.where(jnp.isnan(scores), LOWEST_KEY + 1, keys)
