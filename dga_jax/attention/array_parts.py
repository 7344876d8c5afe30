"""Parts of an array whose gradients are added in place, and parts that are written in place.

The transpose of a slice pads the gradient to the whole array, and each further use of the array
adds one more whole array. Here the array is passed on: use the returned array downstream. Its
gradient then arrives at the slice, which adds the part's gradient in place.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

type Starts = tuple[int, ...]
type Sizes = tuple[int, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def take_part(
  x: Shaped[Array, "..."], starts: Starts, sizes: Sizes
) -> tuple[Shaped[Array, "..."], Shaped[Array, "..."]]:
  """The array, for all further uses, and a slice of it.

  Args:
    x: any array.
    starts: first index of the slice on the leading axes; the other axes are whole.
    sizes: sizes of the slice on the same axes.
  """
  return x, _slice(x, starts, sizes)


def _take_part_fwd(x: Array, starts: Starts, sizes: Sizes) -> tuple[tuple[Array, Array], None]:
  return take_part(x, starts, sizes), None


def _take_part_bwd(
  starts: Starts, sizes: Sizes, _: None, cotangents: tuple[Array, Array]
) -> tuple[Array]:
  whole, part = cotangents
  # Without the barrier XLA fuses the sum with the update, and the fusion copies the whole array.
  summed = jax.lax.optimization_barrier(_slice(whole, starts, sizes) + part)
  return (_update(whole, summed, starts),)


take_part.defvjp(_take_part_fwd, _take_part_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def put_part(
  x: Shaped[Array, "..."], part: Shaped[Array, "..."], starts: Starts
) -> Shaped[Array, "..."]:
  """The array with a part written over it, in place where XLA can.

  The part of x that is overwritten must be a constant: its gradient is not set to zero, which would
  copy the gradient of the result.

  Args:
    x: any array.
    part: as x, of smaller size on the leading axes.
    starts: first index of the part on the leading axes.
  """
  return _update(x, part, starts)


def _put_part_fwd(x: Array, part: Array, starts: Starts) -> tuple[Array, Sizes]:
  return _update(x, part, starts), part.shape


def _put_part_bwd(starts: Starts, shape: Sizes, cotangent: Array) -> tuple[Array, Array]:
  return cotangent, _slice(cotangent, starts, shape[: len(starts)])


put_part.defvjp(_put_part_fwd, _put_part_bwd)


def _slice(x: Array, starts: Starts, sizes: Sizes) -> Array:
  return x[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]


def _update(x: Array, part: Array, starts: Starts) -> Array:
  first = [jnp.int32(start) for start in (*starts, *(0,) * (x.ndim - len(starts)))]
  return jax.lax.dynamic_update_slice(x, part.astype(x.dtype), first)
