"""Sampling the next token from logits, with settings of its own for each sequence."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from dga_jax.config_dataclasses import LARGEST_SEED

_LARGEST_INT32 = 2**31 - 1
_LEAST_TEMPERATURE = 1e-6  # Logits divided by less could overflow float32.
NOT_FINITE = -1
"""The token that `sample` returns for logits that are not finite."""
MAX_BIASED_TOKENS = 300
"""The largest number of entries of `Sampling.logit_bias`."""
MAX_TOP_LOGPROBS = 20
"""The largest value of `Sampling.top_logprobs`."""


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
    logit_bias: pairs (token id, number added to its logit), before every other setting.
    top_logprobs: tokens whose log probabilities are returned with every sampled token, most likely
      first; 0 returns those of the sampled tokens alone, None returns none.
  """

  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 0.95
  min_p: float = 0.0
  seed: int = 0
  logit_bias: tuple[tuple[int, float], ...] = ()
  top_logprobs: int | None = None

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
    if len(self.logit_bias) > MAX_BIASED_TOKENS:
      raise ValueError(
        f"logit_bias has {len(self.logit_bias)} entries; it may have at most {MAX_BIASED_TOKENS}."
      )
    if not all(token >= 0 and math.isfinite(bias) for token, bias in self.logit_bias):
      raise ValueError(
        f"logit_bias is {self.logit_bias}; it must have pairs of a token id and a finite number."
      )
    if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
      raise ValueError(
        f"top_logprobs is {self.top_logprobs}; it must be from 0 to {MAX_TOP_LOGPROBS}, or None."
      )

  def with_offset(self, offset: int) -> Self:
    """The same settings with seed + offset, modulo 2³²."""
    return dataclasses.replace(self, seed=(self.seed + offset) % (LARGEST_SEED + 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """The `Sampling` of every sequence of a batch, as arrays; K biased tokens a sequence."""

  temperature: Float[Array, "B"]
  top_k: Int[Array, "B"]
  top_p: Float[Array, "B"]
  min_p: Float[Array, "B"]
  seed: UInt[Array, "B"]
  biased_token: Int[Array, "B K"]
  bias: Float[Array, "B K"]
  wants_logprobs: Bool[Array, "B"]

  @classmethod
  def from_samplings(cls, samplings: Sequence[Sampling]) -> "SamplingParams":
    """NumPy arrays of these settings, one entry for each."""
    biased = np.full((len(samplings), MAX_BIASED_TOKENS), _LARGEST_INT32, np.int32)
    bias = np.zeros(biased.shape, np.float32)
    for row, one in enumerate(samplings):
      for column, (token, value) in enumerate(one.logit_bias):
        biased[row, column], bias[row, column] = token, value

    def column_of(name: str, dtype: type[np.generic]) -> np.ndarray:
      return np.array([getattr(one, name) for one in samplings], dtype)

    arrays = {
      "temperature": column_of("temperature", np.float32),
      "top_k": column_of("top_k", np.int32),
      "top_p": column_of("top_p", np.float32),
      "min_p": column_of("min_p", np.float32),
      "seed": column_of("seed", np.uint32),
      "biased_token": biased,
      "bias": bias,
      "wants_logprobs": np.array([one.top_logprobs is not None for one in samplings]),
    }
    return cls(**arrays)  # type: ignore[arg-type]  # JAX takes NumPy arrays for its own.


class Sampled(NamedTuple):
  """The next token of every sequence, and log probabilities.

  Log probabilities are those of the model: the logits before bias, temperature and filters. They
  are 0 where no sequence of the batch wants them. K is `MAX_TOP_LOGPROBS`, or V if that is less,
  or 0 without log probabilities.
  """

  token: Int[Array, "*T B"]
  logprob: Float[Array, "*T B"]
  top_token: Int[Array, "*T B K"]
  top_logprob: Float[Array, "*T B K"]


def sample_with_logprobs(
  logits_BxV: Float[Array, "B V"],
  params: SamplingParams,
  step_B: Int[Array, "B"],
  *,
  logprobs: bool,
) -> Sampled:
  """As `sample`, with log probabilities if `logprobs` is set."""
  B, V = logits_BxV.shape
  K = min(MAX_TOP_LOGPROBS, V) if logprobs else 0
  token_B = sample(logits_BxV, params, step_B)

  def compute() -> tuple[Array, Array, Array]:
    return token_logprobs(logits_BxV, token_B)[1:]

  def none() -> tuple[Array, Array, Array]:
    return jnp.zeros(B), jnp.zeros((B, K), jnp.int32), jnp.zeros((B, K))

  if not logprobs:
    return Sampled(token_B, *none())
  return Sampled(token_B, *jax.lax.cond(jnp.any(params.wants_logprobs), compute, none))


def token_logprobs(logits_BxV: Float[Array, "B V"], token_B: Int[Array, "B"]) -> Sampled:
  """Given tokens with their log probabilities, and those of the most likely tokens.

  Args:
    logits_BxV: float32.
    token_B: the tokens; negative ones are read as 0.
  """
  logprob_BxV = jax.nn.log_softmax(logits_BxV, axis=-1)
  top_BxK, top_token_BxK = jax.lax.top_k(logprob_BxV, min(MAX_TOP_LOGPROBS, logits_BxV.shape[1]))
  own_B = jnp.take_along_axis(logprob_BxV, jnp.maximum(token_B, 0)[:, None], axis=-1)[:, 0]
  return Sampled(token_B, own_B, top_token_BxK, top_BxK)


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
  is_finite_B = jnp.isfinite(logits_BxV).all(axis=-1)
  logits_BxV = jax.lax.cond(
    jnp.any(params.bias != 0), lambda: _biased(logits_BxV, params), lambda: logits_BxV
  )
  greedy_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
  sampled_B = jax.lax.cond(
    jnp.any(params.temperature > 0),  # Skip the vocabulary sort when every row is greedy.
    lambda: _sample(logits_BxV, params, step_B),
    lambda: greedy_B,
  )
  token_B = jnp.where(params.temperature > 0, sampled_B, greedy_B)
  return jnp.where(is_finite_B, token_B, NOT_FINITE)


def _biased(logits_BxV: Array, params: SamplingParams) -> Array:
  """Logits with `logit_bias`; the ids of unused entries are out of range and dropped."""
  row_Bx1 = jnp.arange(logits_BxV.shape[0])[:, None]
  return logits_BxV.at[row_Bx1, params.biased_token].add(params.bias, mode="drop")


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
  key_B = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(params.seed), step_B)
  choose = jax.vmap(jax.random.categorical)
  rank_B = choose(key_B, jnp.where(allowed_BxV, sorted_BxV, -jnp.inf))
  return jnp.take_along_axis(order_BxV, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
