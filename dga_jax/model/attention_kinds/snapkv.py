"""SnapKV (Li et al., arXiv 2404.14469): the last queries of a prompt vote for its tokens."""

import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dga_jax.model.attention_kinds.baseline_settings import BaselineSettings
from dga_jax.model.attention_kinds.token_selection import mark_highest, PromptEvictionAttention
from pallas_kernels.gather import take_positions
from pallas_kernels.masks import masked_softmax
from pallas_kernels.products import einsum_float32


@dataclasses.dataclass(frozen=True)
class SnapKVConfig(BaselineSettings):
  """The observation window of a prompt, and the earlier tokens with the most votes.

  The votes for a token are the attention that the last `window` queries pay to it, summed over
  these queries, then the maximum over `kernel` adjacent tokens (max pooling, stride 1). The
  defaults are those of the paper's LongBench experiments. The paper states the rule for one query
  head; here the votes of the query heads that share a KV head are added, so that the cache has one
  entry for each KV head. Tokens that follow the prompt stay.

  Attributes:
    capacity: tokens of the prompt that stay, the observation window included.
    window: last tokens of the prompt, whose queries vote and which stay.
    kernel: an odd number of tokens.
  """

  capacity: int = 1024
  window: int = 32
  kernel: int = 7

  _LEAST: ClassVar = {"capacity": 1, "window": 1, "kernel": 1}

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.capacity < self.window:
      raise ValueError(
        f"SnapKVConfig.capacity is {self.capacity}; it must be at least window={self.window}."
      )
    if self.kernel % 2 == 0:
      raise ValueError(f"SnapKVConfig.kernel is {self.kernel}; it must be odd.")

  def with_budget(self, keys: int) -> Self:
    """The same window and pooling, with a capacity of `keys` tokens."""
    return self._with_budget(keys, self.window, capacity=keys)


@dataclasses.dataclass(frozen=True)
class SnapKVAttention(PromptEvictionAttention):
  """Dense attention over the prompt; decoding reads the tokens that stay."""

  name = "snapkv"

  settings: SnapKVConfig

  def keep(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    length_B: Int[Array, "B"],
  ) -> Bool[Array, "B N L"]:
    """The observation window, and the tokens before it with the most pooled votes."""
    (B, L, H, D), N = q_BxLxHxD.shape, k_BxLxNxD.shape[2]
    window, pad = self.settings.window, self.settings.kernel // 2
    position_BxW = length_B[:, None] - window + jnp.arange(window)[None]
    # A position before the prompt gives no query.
    is_query_BxW = position_BxW >= 0
    q_BxWxHxD = take_positions(q_BxLxHxD, jnp.where(is_query_BxW, position_BxW, L))
    logits_BxNxRxWxL = D**-0.5 * einsum_float32(
      "bwnrd,blnd->bnrwl", q_BxWxHxD.reshape(B, window, N, H // N, D), k_BxLxNxD
    )
    i_L = jnp.arange(L)
    visible_BxWxL = (i_L[None, None] <= position_BxW[..., None]) & is_query_BxW[..., None]
    weights = masked_softmax(logits_BxNxRxWxL, visible_BxWxL[:, None, None])
    before_BxL = i_L[None] < length_B[:, None] - window
    votes_BxNxL = jnp.where(before_BxL[:, None], weights.sum(axis=(2, 3)), -jnp.inf)
    pooled_BxNxL = jax.lax.reduce_window(
      votes_BxNxL,
      -jnp.inf,
      jax.lax.max,
      (1, 1, 2 * pad + 1),
      (1, 1, 1),
      ((0, 0), (0, 0), (pad, pad)),
    )
    score_BxNxL = jnp.where(before_BxL[:, None], pooled_BxNxL, -jnp.inf)
    chosen_BxNxL = mark_highest(score_BxNxL, self.settings.capacity - window)
    return chosen_BxNxL | ~before_BxL[:, None]
