"""Dynamic Group Attention with one part swapped, to find out which part loses or wins.

All of it concerns streaming selection over whole sequences, where that is what decoding computes.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dga_jax.attention.attend import attend_merged, make_plan, merge_planned
from dga_jax.attention.metadata import AttentionMetadata, prepare
from dga_jax.attention.plan import GroupPlan
from dga_jax.attention.segments import Documents
from dga_jax.attention.selection import Selection as FocalSelection
from dga_jax.config import DGAConfig
from dga_jax.model.attention_kinds.base import AttentionKind
from pallas_kernels.masks import masked_softmax
from pallas_kernels.products import einsum_float32

Selection = Literal["own", "random", "oracle"]
Merging = Literal["own", "mean", "hidden"]
_BLOCK_Q = 256


@dataclasses.dataclass(frozen=True)
class AblatedDGA(AttentionKind):
  """An attention kind for whole sequences of one document; it has no cache.

  Attributes:
    config: with streaming selection.
    selection: which f tokens of a block stay focal: "own", the choice of the block's last query;
      "random"; or "oracle", the tokens to which later queries, for which the block is no longer
      raw, would pay most under dense attention.
    merging: weights of the other tokens: "own", "mean", or "hidden" for groups that no query sees.
    focal: False hides the focal tokens, except sinks.

  Raises:
    ValueError: the config has another selection than streaming.
  """

  name = "ablated dga"

  config: DGAConfig
  selection: Selection = "own"
  merging: Merging = "own"
  focal: bool = True

  def __post_init__(self) -> None:
    if self.config.selection != "streaming":
      raise ValueError(
        f"config.selection is {self.config.selection!r}; ablations want 'streaming'."
      )

  @property
  def takes_focal_scores(self) -> bool:
    """See `AttentionKind`."""
    return self.config.selector == "fitted"

  def prepare(self, documents: Documents) -> AttentionMetadata:
    """The rows.

    Raises:
      ValueError: padded or packed rows.
    """
    if documents.rows != "whole":
      raise ValueError(
        "segment_ids or lengths are given; ablations want whole rows of one document."
      )
    return prepare(documents, self.config)

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: AttentionMetadata,
    focal_scores: Float[Array, "B L N"] | None = None,
  ) -> Float[Array, "B L H D"]:
    """The op with the parts that the fields name."""
    if self.selection == "own":
      plan = make_plan(q_BxLxHxD, k_BxLxNxD, metadata, focal_scores)
    else:
      scores = _random_scores if self.selection == "random" else received_later
      focal_BxNxL = focal_by_score(scores(q_BxLxHxD, k_BxLxNxD, self.config), self.config)
      plan = GroupPlan.from_selection(FocalSelection(focal_BxNxL), metadata)
    weighing = jnp.zeros_like(q_BxLxHxD) if self.merging == "mean" else q_BxLxHxD
    merged = merge_planned(weighing, k_BxLxNxD, v_BxLxNxD, self._hide(plan))
    return attend_merged(merged._replace(query=q_BxLxHxD), plan.invalid, self.config)

  def _hide(self, plan: GroupPlan) -> GroupPlan:
    visibility = plan.visibility
    if self.merging == "hidden":
      visibility = visibility._replace(group_end=visibility.group_start)
    if not self.focal:
      sinks = visibility.focal_start + self.config.sink_tokens
      visibility = visibility._replace(focal_end=jnp.minimum(visibility.focal_end, sinks))
    return dataclasses.replace(plan, visibility=visibility)


def swaps(config: DGAConfig) -> dict[str, AblatedDGA]:
  """The parts of a config, swapped one at a time, and what is left without each."""
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
  """Sinks, and the f highest scores of every complete block; ties go to the earlier token."""
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
  """Dense attention that each key receives from queries that do not see it raw any more."""
  B, L, H, D = q_BxLxHxD.shape
  N = k_BxLxNxD.shape[2]
  block = min(_BLOCK_Q, L)
  padded = math.ceil(L / block) * block
  q_BxLxHxD = jnp.pad(q_BxLxHxD, ((0, 0), (0, padded - L), (0, 0), (0, 0)))
  of_block_L = (jnp.arange(padded) - config.sink_tokens) // config.block_size

  def add(total_BxNxL: Array, start: Array) -> tuple[Array, None]:
    i_b = start + jnp.arange(block)
    q_BxbxHxD = jax.lax.dynamic_slice_in_dim(q_BxLxHxD, start, block, axis=1)
    logits_BxNxRxbxL = D**-0.5 * einsum_float32(
      "bqnrd,blnd->bnrql", q_BxbxHxD.reshape(B, block, N, H // N, D), k_BxLxNxD
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
