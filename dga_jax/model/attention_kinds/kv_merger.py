"""Merging of adjacent similar keys with Gaussian weights, after KVMerger (arXiv 2407.08454).

The paper merges neighbours whose keys have a cosine similarity above a threshold. Here the budget
sets the number of merges: the most similar pairs of neighbours are linked, as many as there are
entries too many, and each run of linked entries becomes one entry.
"""

import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dga_jax.model.attention_kinds.baseline_settings import BaselineSettings
from dga_jax.model.attention_kinds.budgeted_cache import BudgetedCacheAttention


@dataclasses.dataclass(frozen=True)
class KVMergerConfig(BaselineSettings):
  """Merging of adjacent similar keys (after KVMerger, Wang et al., arXiv 2407.08454).

  Attributes:
    budget: the number of tokens and merged runs that are kept.
    heavy: the number of tokens that stay unmerged for the attention that they have accumulated.
    recent: the number of last tokens, which stay unmerged.
    interval: tokens between two mergings; the cache holds budget + interval entries. The default
      budget is half of 4096 tokens, the larger of the paper's two.
    dense_prompt: as for TopKEvictionConfig.
  """

  budget: int = 2048
  heavy: int = 245
  recent: int = 512
  interval: int = 64
  dense_prompt: bool = False

  _LEAST: ClassVar = {"budget": 2, "interval": 1}

  def __post_init__(self) -> None:
    super().__post_init__()
    # Each heavy token removes two links between neighbours, and `interval` links are needed.
    least = 2 * self.heavy + self.recent + 1
    if self.budget < least:
      raise ValueError(
        f"KVMergerConfig.budget is {self.budget}; it must be at least 2·heavy + recent + 1 ="
        f" {least}, so that enough neighbours can merge."
      )

  @property
  def entries(self) -> int:
    """Entries that a merging keeps."""
    return self.budget

  def with_budget(self, keys: int) -> Self:
    """The interval (at most an eighth), and the rest as budget; heavy and recent in proportion."""
    interval = max(1, min(self.interval, keys // 8))
    budget = keys - interval
    heavy, recent = (int(share * budget / self.budget) for share in (self.heavy, self.recent))
    changes = {"budget": budget, "heavy": heavy, "recent": recent, "interval": interval}
    return self._with_budget(keys, 3, **changes)


def kv_merger(settings: KVMergerConfig) -> BudgetedCacheAttention:
  """The attention kind of these settings."""

  def rule(
    key_CxD: Float[Array, "C D"],
    value_CxD: Float[Array, "C D"],
    accumulated_C: Float[Array, "C"],
    held: Int[Array, ""],
  ) -> tuple[Array, Array, Array]:
    linked_C = links(key_CxD, accumulated_C, held, settings)
    run_C = jnp.cumsum(~linked_C) - 1
    weight_C = gaussian_weights(key_CxD, accumulated_C, run_C)

    def total(x: Array) -> Array:
      # Sum into C runs, then cut, so that the scatter stays inside its array: see
      # pallas_kernels/compact_indices/xla.py.
      return jax.ops.segment_sum(x, run_C, len(run_C), indices_are_sorted=True)[: settings.budget]

    def merged(x_CxD: Array) -> Array:
      sum_KxD = total(weight_C[:, None] * x_CxD.astype(jnp.float32))
      return (sum_KxD / jnp.maximum(total(weight_C), 1e-30)[:, None]).astype(x_CxD.dtype)

    return merged(key_CxD), merged(value_CxD), total(accumulated_C)

  return BudgetedCacheAttention(
    "kv_merger", settings.budget, settings.interval, rule, settings.dense_prompt
  )


def links(
  key_CxD: Float[Array, "C D"],
  accumulated_C: Float[Array, "C"],
  held: Int[Array, ""],
  settings: KVMergerConfig,
) -> Bool[Array, "C"]:
  """True for entries that join the entry before them.

  Heavy and recent entries have no links. Of the other pairs of neighbours, the held − budget pairs
  with the largest cosine are linked; ties go to the earlier pair.
  """
  i_C = jnp.arange(len(accumulated_C))
  old_C = i_C < held - settings.recent
  _, heavy_K = jax.lax.top_k(jnp.where(old_C, accumulated_C, -jnp.inf), settings.heavy)
  free_C = old_C.at[heavy_K].set(False)
  key_CxD = jax.lax.stop_gradient(key_CxD.astype(jnp.float32))
  norm_C = jnp.linalg.norm(key_CxD, axis=-1)
  before_CxD, norm_before_C = jnp.roll(key_CxD, 1, axis=0), jnp.roll(norm_C, 1)
  cosine_C = (key_CxD * before_CxD).sum(axis=-1) / jnp.maximum(norm_C * norm_before_C, 1e-30)
  may_C = free_C & jnp.roll(free_C, 1) & (i_C > 0)
  by_rank_C = jnp.argsort(jnp.where(may_C, -cosine_C, jnp.inf), stable=True)
  rank_C = jnp.zeros_like(i_C).at[by_rank_C].set(i_C)
  return may_C & (rank_C < held - settings.budget)


def gaussian_weights(
  key_CxD: Float[Array, "C D"], accumulated_C: Float[Array, "C"], run_C: Int[Array, "C"]
) -> Float[Array, "C"]:
  """exp(−‖K − K_pivot‖²/2σ²); the pivot of a run is its entry with the most attention.

  σ² is the run's mean of ‖K − K_pivot‖², the pivot included, so that weights do not depend on
  the scale of the keys.
  """
  C = len(accumulated_C)
  most_C = jax.ops.segment_max(accumulated_C, run_C, C, indices_are_sorted=True)
  i_C = jnp.arange(C)
  candidate_C = jnp.where(accumulated_C == most_C[run_C], i_C, C)
  pivot_C = jax.ops.segment_min(candidate_C, run_C, C, indices_are_sorted=True)
  key_CxD = key_CxD.astype(jnp.float32)
  pivot_CxD = key_CxD.at[pivot_C[run_C]].get(mode="clip")
  square_C = jnp.square(key_CxD - pivot_CxD).sum(axis=-1)
  size_C = jax.ops.segment_sum(jnp.ones(C), run_C, C, indices_are_sorted=True)
  sum_C = jax.ops.segment_sum(square_C, run_C, C, indices_are_sorted=True)
  variance_C = (sum_C / jnp.maximum(size_C, 1))[run_C]
  return jnp.exp(-square_C / (2 * jnp.where(variance_C == 0, 1, variance_C)))
