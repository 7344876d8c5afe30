"""The two entries to merge_groups: checks what applies, picks an implementation."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.dispatch import choose, triton_refusal
from pallas_kernels.group_merge.entries import Entries
from pallas_kernels.group_merge.xla import merge_blocks_xla, merge_groups_xla

_MOST_ROWS = 128  # of a group: more do not fit a kernel's registers
_MOST_FOCAL = 16  # of a block, on a TPU: a kernel goes through them one by one
_MOST_POSITIONS = 2**19  # of a row, on a TPU
_MOST_SCALARS = 2**17  # that lie in a TPU's scalar memory: one for 128 rows that are moved


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
  implementation: str | None = None,
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
    implementation: "xla", "triton", "mosaic_tpu", or None for the kernels where they apply.

  Returns:
    The query, and the entries. Who goes on with the returned query lets the backward pass add
    its gradients in place. Kernels may leave a few rows of zeros behind the asked ones.
  """
  arrays = (query, key, value, focal_index, member_index, group_query)
  refusals = {
    "triton": _triton_refusal(query, key, member_index.shape[-1]),
    "mosaic_tpu": _mosaic_tpu_refusal(query, key, *member_index.shape[-2:], focal=0),
  }
  taken = choose(implementation, refusals, query, key)
  if taken == "xla":
    return merge_groups_xla(*arrays, scale=scale, reorder_window=reorder_window)
  # Imported when used: they load compilers that most machines have no use for.
  if taken == "mosaic_tpu":
    from pallas_kernels.group_merge.mosaic_tpu_group_merge import merge_groups_mosaic_tpu

    return merge_groups_mosaic_tpu(*arrays, scale=scale, reorder_window=reorder_window)
  from pallas_kernels.group_merge.triton_group_merge import merge_groups_triton

  return merge_groups_triton(*arrays, scale=scale, reorder_window=reorder_window)


def merge_blocks(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  start: Int[Array, "B k"] | None,
  *,
  members: int,
  focal: int,
  scale: float,
  implementation: str | None = None,
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
  size = members + focal
  count = key.shape[1] // size if start is None else start.shape[1]
  refusals = {
    "triton": _triton_refusal(query, key, size),
    "mosaic_tpu": _mosaic_tpu_refusal(query, key, count, size, focal=focal),
  }
  options: dict[str, Any] = {"members": members, "focal": focal, "scale": scale}
  taken = choose(implementation, refusals, query, key)
  if taken == "mosaic_tpu":
    from pallas_kernels.group_merge.mosaic_tpu_group_merge import merge_blocks_mosaic_tpu

    return merge_blocks_mosaic_tpu(query, key, value, start, **options)
  if start is None:
    start_k = size * jnp.arange(count, dtype=jnp.int32)
    start = jnp.broadcast_to(start_k, (key.shape[0], count))
  if taken == "xla":
    return merge_blocks_xla(query, key, value, start, **options)
  from pallas_kernels.group_merge.triton_group_merge import merge_blocks_triton

  return merge_blocks_triton(query, key, value, start, **options)


def _triton_refusal(query: Array, key: Array, rows: int) -> str | None:
  """Why the kernels cannot compute a call with groups or blocks of `rows` rows."""
  if reason := triton_refusal(query):
    return reason
  if rows > _MOST_ROWS:
    return f"a group or block has {rows} tokens; these kernels take {_MOST_ROWS}"
  if 0 in key.shape:
    return "an array is empty"
  return None


def _mosaic_tpu_refusal(
  query: Array, key: Array, count: int, rows: int, *, focal: int
) -> str | None:
  """Why the TPU kernels cannot compute a call with `count` groups of `rows` rows."""
  B, L, N, D = key.shape
  if D % 8 or D > 256:
    return f"head_dim is {D}; these kernels want a multiple of 8, at most 256"
  if query.dtype not in (jnp.bfloat16, jnp.float32):
    return f"dtype is {query.dtype}; these kernels have bfloat16 and float32"
  if rows > _MOST_ROWS or focal > _MOST_FOCAL:
    return (
      f"a group or block has {rows} tokens, {focal} of them chosen; these kernels take"
      f" {_MOST_ROWS} and {_MOST_FOCAL}"
    )
  if 0 in key.shape:
    return "an array is empty"
  # Where rows lie is known before a kernel runs, in scalar memory.
  scalars = B * N * (max(L, count * rows) // 128 + L // 512)
  if L > _MOST_POSITIONS or scalars > _MOST_SCALARS:
    return f"{B} rows of {L} tokens with {N} KV heads are too many for one call"
  return None
