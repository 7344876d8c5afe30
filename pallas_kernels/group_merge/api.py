"""The two entry points of group merging: groups by index, and blocks of consecutive tokens."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.group_merge.entries import Entries


def merge_groups(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  focal_index: Int[Array, "B N r"],
  member_index: Int[Array, "B N k m"],
  group_query: Int[Array, "B N k"],
  *,
  scale: float,
  reorder_window: bool,
  implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "B L H D"], Entries]:
  """Picks focal tokens, merges groups (Eq. 14 of the paper), and lays out the window.

  Group g's members j are merged to Σ_j w_j K_j and Σ_j w_j V_j, with w the softmax over members
  of scale · q · K_j for the query q at group_query, averaged over the query heads of a KV head.

  Args:
    query: any float dtype, which all arrays share.
    focal_index: positions of the focal tokens, ascending, L where there is none. No position
      occurs twice in a head's two index arrays.
    member_index: positions of each group's members, ascending from group to group, L where there
      is none.
    group_query: the position whose query weighs a group's members.
    scale: of the merge logits.
    reorder_window: whether the window is the members one after the other; else all tokens.
    implementation: "triton" (Ampere and newer GPUs), "mosaic_tpu" (TPUs) or "xla" (any device); a
      tuple of names in order of preference; None for the first that can run the call.

  Returns:
    The query, and the entries. Who goes on with the returned query lets the backward pass add
    its gradients in place. Kernels may leave a few rows of zeros behind the asked ones.
  """
  result: tuple[Array, Entries] = dispatch.run(
    "merge_groups",
    implementation,
    query,
    key,
    value,
    focal_index,
    member_index,
    group_query,
    scale=scale,
    reorder_window=reorder_window,
  )
  return result


def merge_blocks(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  start: Int[Array, "B k"] | None,
  *,
  members: int,
  focal: int,
  scale: float,
  implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "B L H D"], Entries, Int[Array, "B N k f"]]:
  """As `merge_groups`, for blocks of consecutive tokens which choose their own focal ones.

  The last query of a block keeps the `focal` tokens to which softmax(q Kᵀ / √D) over the block,
  summed over the query heads of a KV head, gives most (ties: the earlier token), and weighs the
  other `members` of them. The window is all tokens.

  Args:
    start: first position of each block, ascending, L for none. None for as many blocks as there
      are in L tokens, one behind the other from the first token on.

  Returns:
    The query, the entries, and the places in their block of the focal tokens, ascending.
  """
  result: tuple[Array, Entries, Array] = dispatch.run(
    "merge_blocks",
    implementation,
    query,
    key,
    value,
    start,
    members=members,
    focal=focal,
    scale=scale,
  )
  return result
