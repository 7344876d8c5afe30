"""The two entry points of group merging: groups by index, and blocks of consecutive tokens."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.group_merge.entries import block_indices, block_starts, Entries
from pallas_kernels.group_merge.xla import highest_in_blocks
from pallas_kernels.head_range import HeadRange


def merge_groups(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  focal_index: Int[Array, "B n r"],
  member_index: Int[Array, "B n k m"],
  group_query: Int[Array, "B n k"],
  *,
  scale: float,
  reorder_window: bool,
  heads: HeadRange | None = None,
  implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "B L H D"], Entries]:
  """Gathers focal tokens, merges groups, and lays out the window.

  The members j of group g are merged to Kᵍ = Σ_j w_j K_j and Vᵍ = Σ_j w_j V_j (Eq. 14 of
  arXiv 2505.22107). w is the softmax over the members of scale · q·K_j, for the query q at
  `group_query`, averaged over the query heads of a KV head. Differentiable in query, key and
  value.

  Args:
    query: any float dtype, which all arrays share.
    focal_index: int32 positions of the focal tokens, ascending; L for none. No position occurs
      twice in the two index arrays of a head.
    member_index: int32 positions of each group's members, ascending from group to group; L for
      none.
    group_query: int32 position of the query that weighs a group's members.
    scale: multiplies the merge logits.
    reorder_window: True for a window of the members in group order; False for all tokens.
    heads: the KV heads whose tokens are gathered and merged; None for all. The index arrays and
      the focal and group entries then have these heads alone. The query and the window stay whole,
      and `reorder_window` must be False.
    implementation: "triton" (Ampere and newer GPUs), "mosaic_tpu" (TPUs) or "xla" (any device); a
      tuple of names in order of preference; None for the first that can run the call.

  Returns:
    The query, and the entries. Use the returned query downstream, so that gradients accumulate
    into one buffer. Focal and group arrays may have more rows than r and k; see `Entries`.

  Raises:
    ValueError: if a name is unknown, or for a reordered window with a range of heads.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  if heads is not None and reorder_window:
    raise ValueError(
      f"reorder_window is True with heads={heads}; a window of all heads has no group order: pass "
      "reorder_window=False, or heads=None."
    )
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
    **({} if heads is None else {"heads": heads}),
  )
  return result


def merge_blocks(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  start: Int[Array, "B k"] | None,
  scores: Float[Array, "B L n"] | None = None,
  *,
  members: int,
  focal: int,
  scale: float,
  first: int = 0,
  heads: HeadRange | None = None,
  implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "B L H D"], Entries, Int[Array, "B n k f"]]:
  """As `merge_groups`, for blocks of consecutive tokens, each with its own choice of focal tokens.

  The `focal` highest-scored tokens of a block stay focal (ties: the earlier token). The last query
  of the block weighs the other `members` tokens as a group. The window is all tokens. Without
  `scores`, the last query scores the tokens by softmax(q Kᵀ / √D), summed over the query heads of
  a KV head. With them, `merge_groups` merges the groups of the choice.

  Args:
    query: any float dtype, which all arrays share.
    start: int32 first position of each block, ascending; L for none. None for consecutive blocks
      from token `first` on, as many as fit.
    scores: of every token and each of `heads`, float32 without NaN; None for the attention of each
      block's last query.
    members: tokens of a block that are merged.
    focal: tokens of a block that stay focal.
    scale: multiplies the merge logits.
    first: the first token of the first block. Without effect if `start` is given.
    heads: as in `merge_groups`; n of them.
    implementation: as in `merge_groups`.

  Returns:
    The query, the entries, and the offsets in their block of the focal tokens, ascending.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  if scores is not None:
    start = block_starts(start, key, members + focal, first)
    chosen = highest_in_blocks(scores, start, size=members + focal, focal=focal)
    query, entries = merge_groups(
      query,
      key,
      value,
      *block_indices(start, chosen, members, key.shape[1]),
      scale=scale,
      reorder_window=False,
      heads=heads,
      implementation=implementation,
    )
    return query, entries, chosen
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
    first=first,
    **({} if heads is None else {"heads": heads}),
  )
  return result
