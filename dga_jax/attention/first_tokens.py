"""The first tokens of every row, with a gradient that is added in place.

The transpose of a slice pads the gradient to the whole array, and the sum with the gradients of
other uses reads and writes the whole array once more.
"""

import functools

import jax
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def take_first_tokens(
  x: Float[Array, "B L N D"], count: int
) -> tuple[Float[Array, "B L N D"], Float[Array, "B S N D"]]:
  """The array, for all further uses, and its first `count` tokens, or L where that is less.

  Use the returned array downstream: its gradient then arrives here, and the gradient of the first
  tokens is added to it in place.

  Args:
    x: keys or values.
    count: at least 0.
  """
  return x, x[:, :count]


def _fwd(x: Array, count: int) -> tuple[tuple[Array, Array], None]:
  return take_first_tokens(x, count), None


def _bwd(count: int, _: None, cotangents: tuple[Array, Array]) -> tuple[Array]:
  whole, part = cotangents
  # Fused with the update, the sum would make XLA copy the whole array.
  summed = jax.lax.optimization_barrier(whole[:, :count] + part)
  return (jax.lax.dynamic_update_slice_in_dim(whole, summed, 0, axis=1),)


take_first_tokens.defvjp(_fwd, _bwd)
