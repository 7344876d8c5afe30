"""Logits: a product with float32 results, whose gradient runs in the compute dtype."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float


def _product(states: Array, table_ExV: Array, dtype: DTypeLike) -> Array:
  return jnp.einsum("...E,EV->...V", states, table_ExV, preferred_element_type=dtype)


@jax.custom_vjp
def logits(states: Float[Array, "*S E"], table_ExV: Float[Array, "E V"]) -> Float[Array, "*S V"]:
  """states·table, float32 for every dtype that the two share.

  The default gradient would multiply the logits' float32 gradient with 16-bit arrays in float32, at
  half the speed or less. For bfloat16 the gradient is rounded first, like all other gradients of
  the model. The range of float16 is too small for it, so it stays float32 there.

  Args:
    states: final states of the decoder.
    table_ExV: the unembedding, same dtype.
  """
  return _product(states, table_ExV, jnp.float32)


def _forward(states: Array, table_ExV: Array) -> tuple[Array, tuple[Array, Array]]:
  return logits(states, table_ExV), (states, table_ExV)


def _backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
  dtype = jnp.bfloat16 if operands[0].dtype == jnp.bfloat16 else jnp.float32
  _, transpose = jax.vjp(lambda states, table: _product(states, table, dtype), *operands)
  return transpose(gradient.astype(dtype))


logits.defvjp(_forward, _backward)
