"""Expected attention (Devoto et al., arXiv 2510.00636): tokens stay for future queries."""

import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dga_jax.model.attention_kinds.baseline_settings import BaselineSettings
from dga_jax.model.attention_kinds.token_selection import mark_highest, PromptEvictionAttention
from dga_jax.model.rope import apply_rope, rope_table


@dataclasses.dataclass(frozen=True)
class ExpectedAttentionConfig(BaselineSettings):
  """The tokens of a prompt to which future queries are expected to pay most.

  Queries before RoPE are taken as Gaussian, with the mean μ and the covariance Σ of the prompt's
  queries. R̄ is the mean RoPE rotation of the next `future_positions` positions. A future query is
  expected to weigh key k by

      z(k) = exp(k·R̄μ/√D + kᵀR̄ΣR̄ᵀk/(2D)),

  and the score of a token is (z(k)/Σz + epsilon)·‖v‖. The tokens with the highest scores stay.
  The first `sinks` tokens stay, and count in none of the means and sums.

  The paper scales by the norm of the value after the output projection, its library by ‖v‖, which
  is used here since attention does not know the projection. The weights of the query heads that
  share a KV head are averaged. Tokens that follow the prompt stay.

  Attributes:
    capacity: tokens of the prompt that stay, sinks included.
    sinks: first tokens.
    future_positions: positions after the prompt over which rotations are averaged.
    epsilon: added to the normalised weight. The paper's 0.02 goes with budgets that differ between
      heads: at one capacity for all, the norm of the value alone would then decide.
  """

  capacity: int = 1024
  sinks: int = 4
  future_positions: int = 512
  epsilon: float = 0.0

  _LEAST: ClassVar = {"capacity": 1, "future_positions": 1}

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.capacity < self.sinks:
      raise ValueError(
        f"ExpectedAttentionConfig.capacity is {self.capacity}; it must be at least"
        f" sinks={self.sinks}."
      )

  def with_budget(self, keys: int) -> Self:
    """A capacity of `keys` tokens."""
    return self._with_budget(keys, max(1, self.sinks), capacity=keys)


@dataclasses.dataclass(frozen=True)
class ExpectedAttention(PromptEvictionAttention):
  """Dense attention over the prompt; decoding reads the tokens that stay.

  Attributes:
    settings: sizes.
    inverse_frequencies: ω [D/2] of the model's RoPE.
  """

  name = "expected_attention"

  settings: ExpectedAttentionConfig
  inverse_frequencies: tuple[float, ...]

  def keep(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    length_B: Int[Array, "B"],
  ) -> Bool[Array, "B N L"]:
    """The sinks and the other tokens with the highest scores."""
    (B, L, H, D), N = q_BxLxHxD.shape, k_BxLxNxD.shape[2]
    settings, i_L = self.settings, jnp.arange(L)
    counts_BxL = (i_L[None] >= settings.sinks) & (i_L[None] < length_B[:, None])
    mean_BxHxD, covariance_BxHxDxD = self._query_statistics(q_BxLxHxD, counts_BxL)
    # k·R̄μ = R̄ᵀk·μ and kᵀR̄ΣR̄ᵀk = (R̄ᵀk)ᵀΣ(R̄ᵀk).
    k_BxLxNxD = self._rotate_back(k_BxLxNxD.astype(jnp.float32), length_B)
    k = jnp.repeat(k_BxLxNxD, H // N, axis=2)
    linear_BxHxL = jnp.einsum("blhd,bhd->bhl", k, mean_BxHxD) / D**0.5
    quadratic_BxHxL = jnp.einsum("blhd,bhde,blhe->bhl", k, covariance_BxHxDxD, k) / (2 * D)
    logits_BxHxL = jnp.where(counts_BxL[:, None], linear_BxHxL + quadratic_BxHxL, -jnp.inf)
    expected_BxNxL = jax.nn.softmax(logits_BxHxL).reshape(B, N, H // N, L).mean(axis=2)
    norm_BxNxL = jnp.linalg.norm(v_BxLxNxD.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    score_BxNxL = jnp.where(
      counts_BxL[:, None], (expected_BxNxL + settings.epsilon) * norm_BxNxL, -jnp.inf
    )
    chosen_BxNxL = mark_highest(score_BxNxL, settings.capacity - settings.sinks)
    return chosen_BxNxL | (i_L < settings.sinks)[None, None]

  def _query_statistics(
    self, q_BxLxHxD: Array, counts_BxL: Array
  ) -> tuple[Float[Array, "B H D"], Float[Array, "B H D D"]]:
    """Mean and covariance of the queries before RoPE."""
    B, L = counts_BxL.shape
    back_BxL = jnp.broadcast_to(-jnp.arange(L)[None], (B, L))
    plain = apply_rope(
      q_BxLxHxD.astype(jnp.float32), rope_table(back_BxL, np.array(self.inverse_frequencies))
    )
    weight_BxL = counts_BxL / jnp.maximum(counts_BxL.sum(axis=1, keepdims=True), 1)
    mean_BxHxD = jnp.einsum("bl,blhd->bhd", weight_BxL, plain)
    centred = plain - mean_BxHxD[:, None]
    return mean_BxHxD, jnp.einsum("bl,blhd,blhe->bhde", weight_BxL, centred, centred)

  def _rotate_back(self, k_BxLxNxD: Array, length_B: Array) -> Float[Array, "B L N D"]:
    """R̄ᵀk, with the mean R̄ of the rotations of the positions after the prompt."""
    future_BxT = length_B[:, None] + jnp.arange(self.settings.future_positions)[None]
    table = rope_table(future_BxT, np.array(self.inverse_frequencies))
    cos, sin = (x.mean(axis=1)[:, None, None] for x in table)
    k1, k2 = jnp.split(k_BxLxNxD, 2, axis=-1)
    return jnp.concatenate([k1 * cos + k2 * sin, k2 * cos - k1 * sin], axis=-1)
