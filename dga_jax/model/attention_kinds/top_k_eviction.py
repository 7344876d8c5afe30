"""Top-k eviction: heavy hitters and recent tokens stay (H2O, arXiv 2306.14048)."""

import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.model.attention_kinds.baseline_settings import BaselineSettings
from dga_jax.model.attention_kinds.budgeted_cache import BudgetedCacheAttention


@dataclasses.dataclass(frozen=True)
class TopKEvictionConfig(BaselineSettings):
  """Heavy hitters and recent tokens (H2O, Zhang et al., arXiv 2306.14048).

  Attributes:
    heavy: the number of tokens kept for the attention that they have accumulated.
    recent: the number of last tokens, which are always kept.
    interval: tokens between two evictions; the cache holds heavy + recent + interval tokens. The
      paper evicts after each token (1). A longer interval keeps more tokens, and sequences are
      read in blocks of it. The defaults keep 10 % and 10 % of 4096 tokens, the paper's budget.
    dense_prompt: False evicts from the first token on; attention is causal and the cache is small
      throughout. True reads a prompt with dense attention and evicts once at its end, by the
      attention of all its queries. Whole sequences are then dense, and decoding computes another
      function.
  """

  heavy: int = 410
  recent: int = 410
  interval: int = 64
  dense_prompt: bool = False

  _LEAST: ClassVar = {"interval": 1}

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.heavy + self.recent < 1:
      raise ValueError("TopKEvictionConfig.heavy + recent is 0; it must be at least 1.")

  @property
  def entries(self) -> int:
    """Tokens that an eviction keeps."""
    return self.heavy + self.recent

  def with_budget(self, keys: int) -> Self:
    """The interval (at most an eighth), and the rest in halves: heavy and recent tokens."""
    interval = max(1, min(self.interval, keys // 8))
    heavy = (keys - interval) // 2
    changes = {"heavy": heavy, "recent": keys - interval - heavy, "interval": interval}
    return self._with_budget(keys, 2, **changes)


def top_k_eviction(settings: TopKEvictionConfig) -> BudgetedCacheAttention:
  """The attention kind of these settings."""

  def rule(
    key_CxD: Float[Array, "C D"],
    value_CxD: Float[Array, "C D"],
    accumulated_C: Float[Array, "C"],
    held: Int[Array, ""],
  ) -> tuple[Array, Array, Array]:
    """Keeps the last `recent` entries, and the others with the most accumulated attention."""
    kept_K = kept_entries(accumulated_C, held, heavy=settings.heavy, recent=settings.recent)
    return key_CxD[kept_K], value_CxD[kept_K], accumulated_C[kept_K]

  return BudgetedCacheAttention(
    "top_k_eviction", settings.entries, settings.interval, rule, settings.dense_prompt
  )


def kept_entries(
  accumulated_C: Float[Array, "C"], held: Int[Array, ""], *, heavy: int, recent: int
) -> Int[Array, "K"]:
  """Indices of the heavy + recent entries that stay, ascending; ties go to the earlier one."""
  i_C = jnp.arange(accumulated_C.shape[0])
  priority_C = jnp.where(i_C >= held - recent, jnp.inf, accumulated_C)
  _, kept_K = jax.lax.top_k(jnp.where(i_C < held, priority_C, -jnp.inf), heavy + recent)
  return jnp.sort(kept_K)
