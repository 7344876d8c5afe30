"""Merging of adjacent similar keys with Gaussian weights, after KVMerger (arXiv 2407.08454).

The paper merges neighbours whose keys have a cosine similarity above a threshold. Here the budget
decides: of all pairs of neighbours, as many as entries have to go are linked, the most similar
first, and runs of linked entries become one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dga_jax.model.attention_kinds.budgeted_cache import BudgetedCacheAttention
from dga_jax.model.baselines import KVMergerConfig


def kv_merger(config: KVMergerConfig) -> BudgetedCacheAttention:
  """The attention kind of these settings."""

  def rule(
    key_CxD: Float[Array, "C D"],
    value_CxD: Float[Array, "C D"],
    received_C: Float[Array, "C"],
    held: Int[Array, ""],
  ) -> tuple[Array, Array, Array]:
    linked_C = links(key_CxD, received_C, held, config)
    run_C = jnp.cumsum(~linked_C) - 1
    weight_C = gaussian_weights(key_CxD, received_C, run_C)

    def total(x: Array) -> Array:
      # Sum in full, then cut, so that no index exceeds the array: see
      # pallas_kernels/compact_indices/xla.py.
      return jax.ops.segment_sum(x, run_C, len(run_C), indices_are_sorted=True)[: config.budget]

    def merged(x_CxD: Array) -> Array:
      sum_KxD = total(weight_C[:, None] * x_CxD.astype(jnp.float32))
      return (sum_KxD / jnp.maximum(total(weight_C), 1e-30)[:, None]).astype(x_CxD.dtype)

    return merged(key_CxD), merged(value_CxD), total(received_C)

  return BudgetedCacheAttention(
    "kv_merger", config.budget, config.interval, rule, config.dense_prompt
  )


def links(
  key_CxD: Float[Array, "C D"],
  received_C: Float[Array, "C"],
  held: Int[Array, ""],
  config: KVMergerConfig,
) -> Bool[Array, "C"]:
  """Which entries join the one before them.

  Heavy and recent entries link with nobody. Of the other neighbours the held − budget most
  similar do, by cosine; ties go to the earlier.
  """
  i_C = jnp.arange(len(received_C))
  old_C = i_C < held - config.recent
  _, heavy_K = jax.lax.top_k(jnp.where(old_C, received_C, -jnp.inf), config.heavy)
  free_C = old_C.at[heavy_K].set(False)
  key_CxD = jax.lax.stop_gradient(key_CxD.astype(jnp.float32))
  norm_C = jnp.linalg.norm(key_CxD, axis=-1)
  before_CxD, norm_before_C = jnp.roll(key_CxD, 1, axis=0), jnp.roll(norm_C, 1)
  cosine_C = (key_CxD * before_CxD).sum(axis=-1) / jnp.maximum(norm_C * norm_before_C, 1e-30)
  may_C = free_C & jnp.roll(free_C, 1) & (i_C > 0)
  by_rank_C = jnp.argsort(jnp.where(may_C, -cosine_C, jnp.inf), stable=True)
  rank_C = jnp.zeros_like(i_C).at[by_rank_C].set(i_C)
  return may_C & (rank_C < held - config.budget)


def gaussian_weights(
  key_CxD: Float[Array, "C D"], received_C: Float[Array, "C"], run_C: Int[Array, "C"]
) -> Float[Array, "C"]:
  """exp(−‖K − K_pivot‖²/2σ²), the pivot of a run being its entry with the most attention.

  σ² is the run's mean of ‖K − K_pivot‖², the pivot included, so that weights do not depend on
  the scale of the keys.
  """
  C = len(received_C)
  most_C = jax.ops.segment_max(received_C, run_C, C, indices_are_sorted=True)
  i_C = jnp.arange(C)
  candidate_C = jnp.where(received_C == most_C[run_C], i_C, C)
  pivot_C = jax.ops.segment_min(candidate_C, run_C, C, indices_are_sorted=True)
  key_CxD = key_CxD.astype(jnp.float32)
  pivot_CxD = key_CxD.at[pivot_C[run_C]].get(mode="clip")
  square_C = jnp.square(key_CxD - pivot_CxD).sum(axis=-1)
  size_C = jax.ops.segment_sum(jnp.ones(C), run_C, C, indices_are_sorted=True)
  sum_C = jax.ops.segment_sum(square_C, run_C, C, indices_are_sorted=True)
  variance_C = (sum_C / jnp.maximum(size_C, 1))[run_C]
  return jnp.exp(-square_C / (2 * jnp.where(variance_C == 0, 1, variance_C)))
