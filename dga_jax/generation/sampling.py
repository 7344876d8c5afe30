"""Choosing the next token from logits, each sequence in its own way."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the tokens of a sequence are drawn.

  The filters apply in the order of the fields, to what the ones before them left.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token, and no filter matters.
    top_k: draws from that many most likely tokens; 0 for all.
    top_p: draws from the fewest most likely tokens that hold at least this probability.
    min_p: draws from tokens with at least this share of the most likely one's probability.
    seed: equal seeds repeat a sequence, whatever its neighbours are.
  """

  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 0.95
  min_p: float = 0.0
  seed: int = 0

  def __post_init__(self) -> None:
    if not (math.isfinite(self.temperature) and self.temperature >= 0):
      raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or positive.")
    if self.top_k < 0:
      raise ValueError(f"top_k is {self.top_k}; it must be 0 (all tokens) or positive.")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1].")
    if not 0 <= self.min_p <= 1:
      raise ValueError(f"min_p is {self.min_p}; it must be in [0, 1].")


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
  def of(cls, samplings: Sequence[Sampling]) -> "SamplingParams":
    """One entry for each."""
    return cls(
      temperature=jnp.array([how.temperature for how in samplings], jnp.float32),
      top_k=jnp.array([how.top_k for how in samplings], jnp.int32),
      top_p=jnp.array([how.top_p for how in samplings], jnp.float32),
      min_p=jnp.array([how.min_p for how in samplings], jnp.float32),
      key=jax.vmap(jax.random.key)(jnp.array([how.seed for how in samplings], jnp.uint32)),
    )


def sample(
  logits_BxV: Float[Array, "B V"], controls: SamplingParams, step_B: Int[Array, "B"]
) -> Int[Array, "B"]:
  """The next token of every sequence: int32 [B].

  Args:
    logits_BxV: float32.
    controls: of each sequence.
    step_B: tokens that each has drawn so far.
  """
  likeliest_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
  drawn_B = jax.lax.cond(
    jnp.any(controls.temperature > 0),  # sorting the vocabulary is not for nothing
    lambda: _draw(logits_BxV, controls, step_B),
    lambda: likeliest_B,
  )
  return jnp.where(controls.temperature > 0, drawn_B, likeliest_B)


def _draw(logits_BxV: Array, controls: SamplingParams, step_B: Array) -> Array:
  """Draws a rank among the filtered, sorted tokens, and looks up whose rank it is."""
  temperature_B = jnp.where(controls.temperature > 0, controls.temperature, 1.0)
  order_BxV = jnp.argsort(-logits_BxV, axis=-1, stable=True)
  sorted_BxV = jnp.take_along_axis(logits_BxV, order_BxV, axis=-1) / temperature_B[:, None]
  rank_V = jnp.arange(sorted_BxV.shape[-1])
  kept_B = jnp.where(controls.top_k > 0, controls.top_k, rank_V.size)
  sorted_BxV = jnp.where(rank_V[None] < kept_B[:, None], sorted_BxV, -jnp.inf)
  probability_BxV = jax.nn.softmax(sorted_BxV, axis=-1)
  before_BxV = jnp.cumsum(probability_BxV, axis=-1) - probability_BxV
  likely_BxV = probability_BxV >= controls.min_p[:, None] * probability_BxV[:, :1]
  allowed_BxV = (before_BxV < controls.top_p[:, None]) & likely_BxV
  key_B = jax.vmap(jax.random.fold_in)(controls.key, step_B)
  choose = jax.vmap(jax.random.categorical)
  rank_B = choose(key_B, jnp.where(allowed_BxV, sorted_BxV, -jnp.inf))
  return jnp.take_along_axis(order_BxV, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
