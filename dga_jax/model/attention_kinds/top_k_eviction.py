"""Top-k eviction: heavy hitters and recent tokens stay (H2O, arXiv 2306.14048)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.model.attention_kinds.budgeted_cache import BudgetedCacheAttention
from dga_jax.model.baselines import TopKEvictionConfig


def top_k_eviction(config: TopKEvictionConfig) -> BudgetedCacheAttention:
  """The attention kind of these settings."""

  def rule(
    key_CxD: Float[Array, "C D"],
    value_CxD: Float[Array, "C D"],
    received_C: Float[Array, "C"],
    held: Int[Array, ""],
  ) -> tuple[Array, Array, Array]:
    """The last `recent` entries, and of the others those that received most attention."""
    kept_K = kept_entries(received_C, held, heavy=config.heavy, recent=config.recent)
    return key_CxD[kept_K], value_CxD[kept_K], received_C[kept_K]

  return BudgetedCacheAttention(
    "top_k_eviction", config.entries, config.interval, rule, config.dense_prompt
  )


def kept_entries(
  received_C: Float[Array, "C"], held: Int[Array, ""], *, heavy: int, recent: int
) -> Int[Array, "K"]:
  """The heavy + recent entries that stay, in order; ties go to the earlier one."""
  i_C = jnp.arange(received_C.shape[0])
  priority_C = jnp.where(i_C >= held - recent, jnp.inf, received_C)
  _, kept_K = jax.lax.top_k(jnp.where(i_C < held, priority_C, -jnp.inf), heavy + recent)
  return jnp.sort(kept_K)
