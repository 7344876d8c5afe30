"""Range masks and the masked softmax of code that XLA compiles."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def in_range(size: int, start: Int[Array, "*s"], end: Int[Array, "*s"]) -> Bool[Array, "*s {size}"]:
  """[..., size] bool: whether index j is in [start, end)."""
  index = jnp.arange(size, dtype=jnp.int32).reshape((1,) * start.ndim + (size,))
  return (start[..., None] <= index) & (index < end[..., None])


def masked_softmax(logits: Float[Array, "*s n"], mask: Bool[Array, "..."]) -> Float[Array, "*s n"]:
  """Softmax over the last axis where the mask holds; 0 elsewhere and in rows without any.

  Args:
    logits: any shape.
    mask: broadcasts against the logits.
  """
  logits = jnp.where(mask, logits, -jnp.inf)
  highest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  weights = jnp.exp(logits - jnp.where(jnp.isneginf(highest), 0, highest))
  total = weights.sum(axis=-1, keepdims=True)
  return weights / jnp.where(total == 0, 1, total)
