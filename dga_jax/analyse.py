"""Small arrays that show a plan: what each query sees, and the weights of merged tokens."""

import enum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dga_jax.attention import validation
from dga_jax.attention.attend import merge_scale
from dga_jax.attention.plan import GroupPlan
from pallas_kernels.group_merge import merge

__all__ = ["Seen", "merge_weights", "visibility"]


class Seen(enum.IntEnum):
  """How a query sees a token."""

  UNSEEN = 0
  FOCAL = 1  # by the token's own key and value, permanently
  MERGED = 2  # through the token's group
  RAW = 3  # by the token's own key and value, until the token is merged or chosen


def visibility(plan: GroupPlan, *, row: int = 0, head: int = 0) -> Int[np.ndarray, "L L"]:
  """How each query (first axis) sees each token (second axis): codes of `Seen`, int8.

  One Python step a query, for short rows.

  Args:
    plan: with concrete arrays, as made outside jit.
    row: index of the row in the batch.
    head: index of the KV head.

  Raises:
    IndexError: the plan has no such row or head.
  """
  focal_r = np.asarray(plan.layout.focal_index)[row, head]
  member_kxm = np.asarray(plan.layout.member_index)[row, head]
  B, N, L = plan.focal_mask.shape
  window_W = member_kxm.reshape(-1) if plan.window_lists_members else np.arange(L)
  *ranges, group_order = plan.visibility
  group_S = np.arange(len(member_kxm)) if group_order is None else group_order[row, head]
  # Ranges that all heads share are stored once.
  ranges_L = (np.broadcast_to(bound, (B, N, L))[row, head] for bound in ranges)
  seen_LxL = np.full((L, L), Seen.UNSEEN, np.int8)
  for i, (focal, focal_end, group, group_end, window, window_end) in enumerate(
    zip(*ranges_L, strict=True)
  ):
    seen_LxL[i, focal_r[focal:focal_end]] = Seen.FOCAL
    seen_LxL[i, member_kxm[group_S[group:group_end]]] = Seen.MERGED
    seen_LxL[i, window_W[window:window_end]] = Seen.RAW
  return seen_LxL


def merge_weights(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  plan: GroupPlan,
  *,
  row: int = 0,
  head: int = 0,
) -> Float[np.ndarray, "k L"]:
  """The weight with which each group merges each token (Eq. 14 of the paper), float32.

  A group's weights sum to 1. They are 0 for tokens outside the group, and in unused groups.

  Args:
    query: queries of the shape that the plan was made for.
    key: keys of the shape that the plan was made for.
    plan: the groups.
    row: index of the row in the batch.
    head: index of the KV head.

  Raises:
    ValueError: the plan was made for other shapes.
    IndexError: the plan has no such row or head.
  """
  validation.query_and_key(query, key)
  plan.check_fits(query, key, plan.config)
  member_kxm = np.asarray(plan.layout.member_index)[row, head]
  group_query_k = np.asarray(plan.layout.group_query)[row, head]
  _, L, H, _ = query.shape
  R = H // key.shape[2]
  q_LxRxD, k_LxD = query[row, :, head * R : (head + 1) * R], key[row, :, head]
  q_kxRxD = jnp.take(q_LxRxD, group_query_k, axis=0, mode="fill", fill_value=0)
  k_kxmxD = jnp.take(k_LxD, member_kxm, axis=0, mode="fill", fill_value=0)
  # The weighted mean of one-hot values is the weights.
  one_hot_kxmxL = jax.nn.one_hot(member_kxm, L)
  _, weights_kx1xL = merge(
    q_kxRxD[:, None],
    k_kxmxD[:, :, None],
    one_hot_kxmxL[:, :, None],
    scale=merge_scale(plan.config, query.shape[-1]),
  )
  return np.asarray(weights_kx1xL[:, 0])
