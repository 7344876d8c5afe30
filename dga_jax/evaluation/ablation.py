"""Ablations of Dynamic Group Attention: variants in which one part is replaced.

They cover streaming selection over whole sequences, for which decoding computes the same function.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from dga_jax.attention import GroupPlan, plan_groups
from dga_jax.attention.aggregate import plan_and_merge
from dga_jax.attention.attend import attend_entries
from dga_jax.attention.layout import streaming_layout
from dga_jax.attention.plan import static_sizes
from dga_jax.config import DGAConfig
from pallas_kernels.masks import masked_softmax

Selection = Literal["own", "random", "oracle"]
Merging = Literal["own", "mean", "hidden"]
_BLOCK_Q = 256


@dataclasses.dataclass(frozen=True)
class AblatedDGA:
  """An attention kind for whole sequences of one document; it has no cache.

  Attributes:
    config: with streaming selection.
    selection: how the f focal tokens of a block are chosen: "own", by the block's last query;
      "random"; or "oracle", the tokens that receive most dense attention from the later queries to
      which the block is no longer visible token by token.
    merging: weights with which the other tokens are merged: "own", or "mean" for equal weights;
      "hidden" hides the groups from all queries.
    focal: False hides the focal tokens, except sinks.
  """

  config: DGAConfig
  selection: Selection = "own"
  merging: Merging = "own"
  focal: bool = True

  def __post_init__(self) -> None:
    if self.config.selection != "streaming":
      raise ValueError(
        f"config.selection is {self.config.selection!r}; it must be 'streaming' for ablations."
      )

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    *,
    segment_ids: Int[Array, "B L"] | None,
    lengths: Int[Array, "B"] | None,
  ) -> Float[Array, "B L H D"]:
    """The op with the parts that the fields choose; arguments as for `dynamic_group_attention`."""
    if segment_ids is not None or lengths is not None:
      raise ValueError(
        "segment_ids or lengths are given; they must be None: ablations take whole rows of one"
        " document."
      )
    plan = plan_groups(q_BxLxHxD, k_BxLxNxD, config=self.config)
    if self.selection != "own":
      scores = _random_scores if self.selection == "random" else received_later
      focal_BxNxL = focal_by_score(scores(q_BxLxHxD, k_BxLxNxD, self.config), self.config)
      # GroupPlan.from_focal_mask counts focal tokens, for which it needs concrete values.
      sizes = static_sizes(self.config, q_BxLxHxD.shape[1], max_documents=1, exact=True)
      layout = streaming_layout(focal_BxNxL, plan.documents, sizes, self.config)
      plan = dataclasses.replace(plan, focal_mask=focal_BxNxL, **layout._asdict())
    weighing = jnp.zeros_like(q_BxLxHxD) if self.merging == "mean" else q_BxLxHxD
    _, _, entries = plan_and_merge(weighing, k_BxLxNxD, v_BxLxNxD, config=self.config, plan=plan)
    return attend_entries(q_BxLxHxD, entries, self._hide(plan))

  def _hide(self, plan: GroupPlan) -> GroupPlan:
    bounds = plan.bounds
    if self.merging == "hidden":
      bounds = bounds._replace(group_end=bounds.group_start)
    if not self.focal:
      sinks = bounds.focal_start + self.config.sink_tokens
      bounds = bounds._replace(focal_end=jnp.minimum(bounds.focal_end, sinks))
    return dataclasses.replace(plan, bounds=bounds)

  def init_cache(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> Any:
    """Raises NotImplementedError: an ablation has no cache."""
    raise NotImplementedError("Ablations compute whole sequences and have no cache.")

  def prefill(self, *arrays: Array, lengths: Array | None, max_length: int) -> Any:
    """Raises NotImplementedError: an ablation has no cache."""
    raise NotImplementedError("Ablations compute whole sequences and have no cache.")

  def decode(self, *arrays: Any) -> Any:
    """Raises NotImplementedError: an ablation has no cache."""
    raise NotImplementedError("Ablations compute whole sequences and have no cache.")


def swaps(config: DGAConfig) -> dict[str, AblatedDGA]:
  """The ablations of a config by name: parts replaced one at a time, and parts left out."""
  alone = dataclasses.replace(config, local_window=0)
  return {
    "as configured": AblatedDGA(config),
    "selection: random": AblatedDGA(config, selection="random"),
    "selection: oracle": AblatedDGA(config, selection="oracle"),
    "merging: mean": AblatedDGA(config, merging="mean"),
    "merging: groups hidden": AblatedDGA(config, merging="hidden"),
    "focal tokens hidden": AblatedDGA(config, focal=False),
    "window alone": AblatedDGA(config, merging="hidden", focal=False),
    "no window": AblatedDGA(alone),
    "no window, groups hidden": AblatedDGA(alone, merging="hidden"),
    "no sinks": AblatedDGA(dataclasses.replace(config, sink_tokens=0)),
  }


def focal_by_score(score_BxNxL: Float[Array, "B N L"], config: DGAConfig) -> Bool[Array, "B N L"]:
  """The mask of the sinks and the f highest scores of every complete block; ties go to the left."""
  B, N, L = score_BxNxL.shape
  size, f = config.block_size, config.focal_in_block
  sinks = min(config.sink_tokens, L)
  blocks = (L - sinks) // size
  score = score_BxNxL[..., sinks : sinks + blocks * size].reshape(B, N, blocks, size)
  _, chosen = jax.lax.top_k(score, f)
  focal = jax.nn.one_hot(chosen, size, dtype=jnp.int32).sum(axis=-2).reshape(B, N, -1) > 0
  rest = jnp.zeros((B, N, L - sinks - blocks * size), bool)
  return jnp.concatenate([jnp.ones((B, N, sinks), bool), focal, rest], axis=-1)


def received_later(
  q_BxLxHxD: Float[Array, "B L H D"], k_BxLxNxD: Float[Array, "B L N D"], config: DGAConfig
) -> Float[Array, "B N L"]:
  """The dense attention that each key receives from queries beyond its block and the raw window.

  Returns:
    float32 [B, N, L], summed over those queries and over the query heads of the KV head.
  """
  B, L, H, D = q_BxLxHxD.shape
  N = k_BxLxNxD.shape[2]
  block = min(_BLOCK_Q, L)
  padded = math.ceil(L / block) * block
  q_BxLxHxD = jnp.pad(q_BxLxHxD, ((0, 0), (0, padded - L), (0, 0), (0, 0)))
  of_block_L = (jnp.arange(padded) - config.sink_tokens) // config.block_size

  def add(total_BxNxL: Array, start: Array) -> tuple[Array, None]:
    i_b = start + jnp.arange(block)
    q_BxbxHxD = jax.lax.dynamic_slice_in_dim(q_BxLxHxD, start, block, axis=1)
    logits_BxNxRxbxL = D**-0.5 * jnp.einsum(
      "bqnrd,blnd->bnrql",
      q_BxbxHxD.reshape(B, block, N, H // N, D),
      k_BxLxNxD,
      preferred_element_type=jnp.float32,
    )
    causal_bxL = (jnp.arange(L)[None] <= i_b[:, None]) & (i_b < L)[:, None]
    paid_BxNxRxbxL = masked_softmax(logits_BxNxRxbxL, causal_bxL[None, None, None])
    summarised_bxL = of_block_L[i_b][:, None] - of_block_L[None, :L] > config.local_window
    later_BxNxRxbxL = jnp.where(summarised_bxL[None, None, None], paid_BxNxRxbxL, 0)
    return total_BxNxL + later_BxNxRxbxL.sum(axis=(2, 3)), None

  nothing = jnp.zeros((B, N, L), jnp.float32)
  return jax.lax.scan(add, nothing, jnp.arange(0, padded, block))[0]


def _random_scores(q_BxLxHxD: Array, k_BxLxNxD: Array, config: DGAConfig) -> Float[Array, "B N L"]:
  B, L, N, _ = k_BxLxNxD.shape
  del q_BxLxHxD
  return jax.random.uniform(jax.random.key(config.seed), (B, N, L))
