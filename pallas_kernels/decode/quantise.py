"""Rows in 8 bits: each is stored as numbers of a narrow type, and one float32 to multiply with."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import DTypeLike, Float, Shaped

# The largest number of each type, which a row's largest one is brought to.
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


def pack_rows(
  rows: Float[Array, "*S D"], dtype: DTypeLike
) -> tuple[Shaped[Array, "*S D"], Float[Array, "*S"] | None]:
  """Rows as a cache of that dtype stores them: numbers and, where it has 8 bits, their scales.

  The scale of a row x is max |x| over the type's largest number, 1 for a row of zeros, and its
  numbers are x / scale, rounded to the nearest.
  """
  largest = _LARGEST.get(jnp.dtype(dtype).name)
  if largest is None:
    return rows.astype(dtype), None
  rows = rows.astype(jnp.float32)
  most = jnp.abs(rows).max(axis=-1)
  scale = jnp.where(most == 0, 1.0, most / largest)
  numbers = rows / scale[..., None]
  if jnp.issubdtype(dtype, jnp.integer):
    numbers = jnp.floor(numbers + 0.5)
  return numbers.astype(dtype), scale


def unpack_rows(
  stored: Shaped[Array, "*S D"], scale: Float[Array, "*S"] | None, dtype: DTypeLike
) -> Float[Array, "*S D"]:
  """The inverse of `pack_rows`, but for its rounding."""
  if scale is None:
    return stored.astype(dtype)
  return (stored.astype(jnp.float32) * scale[..., None]).astype(dtype)
