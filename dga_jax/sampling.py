"""Choosing the next token from logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token.
    top_p: draws from the fewest most likely tokens that hold at least this probability.
    seed: a sequence's draws depend on it and on the sequence's place in the batch alone.
  """

  temperature: float = 0.8
  top_p: float = 0.95
  seed: int = 0

  def __post_init__(self) -> None:
    if not (math.isfinite(self.temperature) and self.temperature >= 0):
      raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or positive.")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1].")

  def keys(self, batch: int) -> Key[Array, "B"]:
    """One random key for each sequence."""
    return jax.random.split(jax.random.key(self.seed), batch)


def sample(
  logits_BxV: Float[Array, "B V"], keys_B: Key[Array, "B"], step: Int[Array, ""], how: Sampling
) -> Int[Array, "B"]:
  """The next token of every sequence: int32 [B].

  Args:
    logits_BxV: float32.
    keys_B: each sequence's key, the same at every step.
    step: tokens generated so far.
    how: static.
  """
  if how.temperature == 0:
    return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
  logits_BxV = _nucleus(logits_BxV / how.temperature, how.top_p)
  step_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, step)
  return jax.vmap(jax.random.categorical)(step_keys_B, logits_BxV).astype(jnp.int32)


def _nucleus(logits_BxV: Array, top_p: float) -> Array:
  """−inf for tokens outside the smallest set of probability top_p (Holtzman et al., 2020)."""
  if top_p == 1:
    return logits_BxV
  sorted_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
  probability_BxV = jax.nn.softmax(sorted_BxV, axis=-1)
  before_BxV = jnp.cumsum(probability_BxV, axis=-1) - probability_BxV
  least_Bx1 = jnp.min(jnp.where(before_BxV < top_p, sorted_BxV, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)
