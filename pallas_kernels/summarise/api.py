"""The two entries to summarise: checks what applies, picks an implementation."""

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.summarise.entries import Entries
from pallas_kernels.summarise.triton_summarise import (
  refusal,
  summarise_blocks_triton,
  summarise_triton,
)
from pallas_kernels.summarise.xla import summarise_blocks_xla, summarise_xla
from pallas_kernels.target import find_target


def summarise(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  focal_index: Int[Array, "B N r"],
  member_index: Int[Array, "B N k m"],
  group_query: Int[Array, "B N k"],
  *,
  scale: float,
  reorder_window: bool,
  implementation: str | None = None,
) -> tuple[Float[Array, "B L H D"], Entries]:
  """Picks focal tokens, merges groups (Eq. 14 of the paper), and lays out the window.

  Group g's members j are merged to Σ_j w_j K_j and Σ_j w_j V_j, with w the softmax over members
  of scale · q · K_j for the query q at group_query, averaged over the query heads of a KV head.

  Args:
    query: any float dtype, which all arrays share.
    focal_index: positions of the focal tokens, L where there is none. No position occurs twice
      in a head's two index arrays.
    member_index: positions of each group's members, L where there is none.
    group_query: the position whose query weighs a group's members.
    scale: of the merge logits.
    reorder_window: whether the window is the members one after the other; else all tokens.
    implementation: "xla", "triton", or None for the kernels where they apply.

  Returns:
    The query, and the entries. Who goes on with the returned query lets the backward pass add
    its gradients in place. Kernels may leave a few rows of zeros behind the asked ones.
  """
  kernels = _kernels_apply(query, key, member_index.shape[-1], implementation)
  compute = summarise_triton if kernels else summarise_xla
  return compute(
    query,
    key,
    value,
    focal_index,
    member_index,
    group_query,
    scale=scale,
    reorder_window=reorder_window,
  )


def summarise_blocks(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  start: Int[Array, "B k"],
  *,
  members: int,
  focal: int,
  scale: float,
  implementation: str | None = None,
) -> tuple[Float[Array, "B L H D"], Entries, Int[Array, "B N k f"]]:
  """As `summarise`, for blocks of consecutive tokens which choose their own focal ones.

  The last query of a block keeps the `focal` tokens to which softmax(q Kᵀ / √D) over the block,
  summed over the query heads of a KV head, gives most (ties: the earlier token), and weighs the
  other `members` of them. The window is all tokens.

  Args:
    start: first position of each block, L for none.

  Returns:
    The query, the entries, and the places in their block of the focal tokens, ascending.
  """
  kernels = _kernels_apply(query, key, members + focal, implementation)
  compute = summarise_blocks_triton if kernels else summarise_blocks_xla
  return compute(query, key, value, start, members=members, focal=focal, scale=scale)


def _kernels_apply(query: Array, key: Array, rows: int, implementation: str | None) -> bool:
  """Whether the kernels compute this call.

  Raises:
    ValueError: if the implementation is unknown.
    NotImplementedError: if the kernels are named and cannot; the message says why.
  """
  if implementation not in (None, "xla", "triton"):
    raise ValueError(f"implementation is {implementation!r}; it must be None, 'xla' or 'triton'.")
  if implementation == "xla":
    return False
  target = find_target(query, key)
  reason = refusal(query, key, rows)
  if (target.capability or 0) < 8.0:
    reason = f"triton runs on an Ampere or newer GPU, and this call is for {target}"
  if reason is not None and implementation is not None:
    raise NotImplementedError(reason)
  return reason is None
