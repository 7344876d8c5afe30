"""From a plan to the keys and values of focal tokens and of merged groups."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention.plan import GroupPlan
from dga_jax.config import DGAConfig


class Summaries(NamedTuple):
  """The three key sources of grouped attention."""

  focal_key: Float[Array, "B r N D"]
  focal_value: Float[Array, "B r N D"]
  group_key: Float[Array, "B k N D"]
  group_value: Float[Array, "B k N D"]
  window_key: Float[Array, "B w N D"]
  window_value: Float[Array, "B w N D"]


def summarise(
  query_BxLxHxD: Float[Array, "B L H D"],
  key_BxLxNxD: Float[Array, "B L N D"],
  value_BxLxNxD: Float[Array, "B L N D"],
  plan: GroupPlan,
) -> Summaries:
  """Picks focal tokens, merges groups, and lays out the window."""
  B, _, H, D = query_BxLxHxD.shape
  N, k, m = plan.member_index.shape[1:]
  member_BxNxkm = plan.member_index.reshape(B, N, k * m)
  member_key_BxkmxNxD = take_rows(key_BxLxNxD, member_BxNxkm)
  member_value_BxkmxNxD = take_rows(value_BxLxNxD, member_BxNxkm)
  query_BxLxNxRD = query_BxLxHxD.reshape(B, -1, N, H // N * D)
  group_query_BxkxNxRxD = take_rows(query_BxLxNxRD, plan.group_query).reshape(B, k, N, H // N, D)
  group_key_BxkxNxD, group_value_BxkxNxD = merge(
    group_query_BxkxNxRxD,
    member_key_BxkmxNxD.reshape(B, k, m, N, D),
    member_value_BxkmxNxD.reshape(B, k, m, N, D),
    plan.config,
  )
  streaming = plan.config.selection == "streaming"
  return Summaries(
    focal_key=take_rows(key_BxLxNxD, plan.focal_index),
    focal_value=take_rows(value_BxLxNxD, plan.focal_index),
    group_key=group_key_BxkxNxD,
    group_value=group_value_BxkxNxD,
    window_key=key_BxLxNxD if streaming else member_key_BxkmxNxD,
    window_value=value_BxLxNxD if streaming else member_value_BxkmxNxD,
  )


def merge(
  query: Float[Array, "*B N R D"],
  key: Float[Array, "*B m N D"],
  value: Float[Array, "*B m N D"],
  config: DGAConfig,
) -> tuple[Float[Array, "*B N D"], Float[Array, "*B N D"]]:
  """Merges the m members of each group (Eq. 14 of the paper).

  w = softmax over members of (q · K_j · scale), averaged over the R query heads of a KV head;
  Kⁿ = Σ w_j K_j and Vⁿ = Σ w_j V_j. Sums are float32, results have the input dtype.
  """
  scale = query.shape[-1] ** -0.5 if config.aggregation_scale == "head_dim" else 1.0
  logits = jnp.einsum("...nrd,...mnd->...nrm", query, key, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(logits * scale, axis=-1).mean(axis=-2)

  def weighted(x: Array) -> Array:
    total = jnp.einsum("...nm,...mnd->...nd", weights, x.astype(jnp.float32), precision="highest")
    return total.astype(x.dtype)

  return weighted(key), weighted(value)


def take_rows(
  x_BxLxNxD: Float[Array, "B L N D"], index_BxNxS: Int[Array, "B N S"]
) -> Float[Array, "B S N D"]:
  """Each head's own selection of positions; zeros for L and beyond."""

  def of_head(x_LxD: Array, index_S: Array) -> Array:
    return x_LxD.at[index_S].get(mode="fill", fill_value=0)

  of_row = jax.vmap(of_head, in_axes=(1, 0), out_axes=1)
  return jax.vmap(of_row)(x_BxLxNxD, index_BxNxS)
