"""Sampling the next token from logits, with settings of its own for each sequence."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dga_jax.config_dataclasses import LARGEST_SEED

_LARGEST_INT32 = 2**31 - 1
_LEAST_TEMPERATURE = 1e-6  # Logits divided by less could overflow float32.
NOT_FINITE = -1
"""The token that `sample` returns for logits that are not finite."""


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the tokens of a sequence are sampled.

  The filters apply in the order of the fields, each to the tokens that the earlier ones kept.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token and ignores the filters.
    top_k: samples from the k most likely tokens; 0 for all.
    top_p: samples from the fewest most likely tokens that have at least this probability together
      (Holtzman et al., 2020).
    min_p: samples from tokens with at least this share of the most likely token's probability.
    seed: 0 to 2³² − 1; the same seed repeats a sequence, whatever else is in the batch.
  """

  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 0.95
  min_p: float = 0.0
  seed: int = 0

  def __post_init__(self) -> None:
    is_valid = math.isfinite(self.temperature) and (
      self.temperature == 0 or self.temperature >= _LEAST_TEMPERATURE
    )
    if not is_valid:
      raise ValueError(
        f"temperature is {self.temperature}; it must be 0 (greedy) or at least"
        f" {_LEAST_TEMPERATURE}."
      )
    if not 0 <= self.top_k <= _LARGEST_INT32:
      raise ValueError(
        f"top_k is {self.top_k}; it must be from 1 to {_LARGEST_INT32}, or 0 for all tokens."
      )
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1].")
    if not 0 <= self.min_p <= 1:
      raise ValueError(f"min_p is {self.min_p}; it must be in [0, 1].")
    if not 0 <= self.seed <= LARGEST_SEED:
      raise ValueError(f"seed is {self.seed}; it must be from 0 to {LARGEST_SEED}.")

  def with_offset(self, offset: int) -> Self:
    """The same settings with seed + offset, modulo 2³²."""
    return dataclasses.replace(self, seed=(self.seed + offset) % (LARGEST_SEED + 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """The `Sampling` of every sequence of a batch, as arrays."""

  temperature: Float[Array, "B"]
  top_k: Int[Array, "B"]
  top_p: Float[Array, "B"]
  min_p: Float[Array, "B"]
  key: Key[Array, "B"]

  @classmethod
  def from_samplings(cls, samplings: Sequence[Sampling]) -> "SamplingParams":
    """The arrays of these settings, one entry for each."""
    return cls(
      temperature=jnp.array([one.temperature for one in samplings], jnp.float32),
      top_k=jnp.array([one.top_k for one in samplings], jnp.int32),
      top_p=jnp.array([one.top_p for one in samplings], jnp.float32),
      min_p=jnp.array([one.min_p for one in samplings], jnp.float32),
      key=jax.vmap(jax.random.key)(jnp.array([one.seed for one in samplings], jnp.uint32)),
    )


def sample(
  logits_BxV: Float[Array, "B V"], params: SamplingParams, step_B: Int[Array, "B"]
) -> Int[Array, "B"]:
  """The next token of every sequence.

  Args:
    logits_BxV: float32.
    params: the settings of each sequence.
    step_B: tokens sampled so far in each sequence.

  Returns:
    int32 [B]. `NOT_FINITE` for a sequence with a logit that is NaN or infinite.
  """
  greedy_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
  sampled_B = jax.lax.cond(
    jnp.any(params.temperature > 0),  # Skip the vocabulary sort when every row is greedy.
    lambda: _sample(logits_BxV, params, step_B),
    lambda: greedy_B,
  )
  token_B = jnp.where(params.temperature > 0, sampled_B, greedy_B)
  return jnp.where(jnp.isfinite(logits_BxV).all(axis=-1), token_B, NOT_FINITE)


def _sample(logits_BxV: Array, params: SamplingParams, step_B: Array) -> Array:
  """Samples a rank among the filtered, sorted tokens, and returns the token of that rank."""
  temperature_B = jnp.where(params.temperature > 0, params.temperature, 1.0)
  order_BxV = jnp.argsort(-logits_BxV, axis=-1, stable=True)
  sorted_BxV = jnp.take_along_axis(logits_BxV, order_BxV, axis=-1) / temperature_B[:, None]
  rank_V = jnp.arange(sorted_BxV.shape[-1])
  kept_B = jnp.where(params.top_k > 0, params.top_k, rank_V.size)
  sorted_BxV = jnp.where(rank_V[None] < kept_B[:, None], sorted_BxV, -jnp.inf)
  probability_BxV = jax.nn.softmax(sorted_BxV, axis=-1)
  before_BxV = jnp.cumsum(probability_BxV, axis=-1) - probability_BxV
  likely_BxV = probability_BxV >= params.min_p[:, None] * probability_BxV[:, :1]
  allowed_BxV = (before_BxV < params.top_p[:, None]) & likely_BxV
  key_B = jax.vmap(jax.random.fold_in)(params.key, step_B)
  choose = jax.vmap(jax.random.categorical)
  rank_B = choose(key_B, jnp.where(allowed_BxV, sorted_BxV, -jnp.inf))
  return jnp.take_along_axis(order_BxV, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
