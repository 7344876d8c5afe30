"""Rows in 8 bits: the numbers of a narrow type, and one float32 scale per row."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import DTypeLike, Float, Shaped

# The largest number of each type. The scale maps the largest element of a row to it.
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


def pack_rows(
  rows: Float[Array, "*S D"], dtype: DTypeLike
) -> tuple[Shaped[Array, "*S D"], Float[Array, "*S"] | None]:
  """Converts rows to the dtype of a cache.

  The scale of a row x in 8 bits is max |x| over the largest number of the type, 1 for a row of
  zeros, and its numbers are x / scale, rounded to the nearest.

  Args:
    rows: of any float dtype.
    dtype: "int8", "float8_e4m3fn", or a wider float dtype, to which rows are cast.

  Returns:
    The numbers, and the float32 scales; None where the dtype has more than 8 bits.
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
  """The inverse of `pack_rows`, up to rounding."""
  if scale is None:
    return stored.astype(dtype)
  return (stored.astype(jnp.float32) * scale[..., None]).astype(dtype)
