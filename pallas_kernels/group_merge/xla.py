"""Group merging by gathers and products that XLA compiles. Runs on any device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gather import take_positions, take_rows
from pallas_kernels.group_merge.entries import block_indices, block_starts, Entries
from pallas_kernels.head_range import all_heads, HeadRange
from pallas_kernels.products import einsum_float32


def merge_groups_xla(
  query_BxLxHxD: Float[Array, "B L H D"],
  key_BxLxNxD: Float[Array, "B L N D"],
  value_BxLxNxD: Float[Array, "B L N D"],
  focal_index_BxNxr: Int[Array, "B n r"],
  member_index_BxNxkxm: Int[Array, "B n k m"],
  group_query_BxNxk: Int[Array, "B n k"],
  *,
  scale: float,
  reorder_window: bool,
  heads: HeadRange | None = None,
) -> tuple[Array, Entries]:
  """See `merge_groups`."""
  whole_BxLxHxD, *whole_window = query_BxLxHxD, key_BxLxNxD, value_BxLxNxD
  heads, num_kv_heads = heads or all_heads(key_BxLxNxD), key_BxLxNxD.shape[2]
  query_BxLxHxD, key_BxLxNxD, value_BxLxNxD = (
    heads.of(x, num_kv_heads) for x in (query_BxLxHxD, key_BxLxNxD, value_BxLxNxD)
  )
  B, _, H, D = query_BxLxHxD.shape
  N, k, m = member_index_BxNxkxm.shape[1:]
  member_BxNxkm = member_index_BxNxkxm.reshape(B, N, k * m)
  member_key_BxkmxNxD = take_rows(key_BxLxNxD, member_BxNxkm)
  member_value_BxkmxNxD = take_rows(value_BxLxNxD, member_BxNxkm)
  query_BxLxNxRD = query_BxLxHxD.reshape(B, -1, N, H // N * D)
  group_query_BxkxNxRxD = take_rows(query_BxLxNxRD, group_query_BxNxk).reshape(B, k, N, H // N, D)
  group_key_BxkxNxD, group_value_BxkxNxD = merge(
    group_query_BxkxNxRxD,
    member_key_BxkmxNxD.reshape(B, k, m, N, D),
    member_value_BxkmxNxD.reshape(B, k, m, N, D),
    scale=scale,
  )
  return whole_BxLxHxD, Entries(
    focal_key=take_rows(key_BxLxNxD, focal_index_BxNxr),
    focal_value=take_rows(value_BxLxNxD, focal_index_BxNxr),
    group_key=group_key_BxkxNxD,
    group_value=group_value_BxkxNxD,
    window_key=member_key_BxkmxNxD if reorder_window else whole_window[0],
    window_value=member_value_BxkmxNxD if reorder_window else whole_window[1],
  )


def merge_blocks_xla(
  query_BxLxHxD: Float[Array, "B L H D"],
  key_BxLxNxD: Float[Array, "B L N D"],
  value_BxLxNxD: Float[Array, "B L N D"],
  start_Bxk: Int[Array, "B k"] | None,
  *,
  members: int,
  focal: int,
  scale: float,
  first: int = 0,
  heads: HeadRange | None = None,
) -> tuple[Array, Entries, Int[Array, "B n k f"]]:
  """See `merge_blocks`."""
  start_Bxk = block_starts(start_Bxk, key_BxLxNxD, members + focal, first)
  heads, num_kv_heads = heads or all_heads(key_BxLxNxD), key_BxLxNxD.shape[2]
  chosen_BxNxkxf = choose_in_blocks(
    heads.of(query_BxLxHxD, num_kv_heads),
    heads.of(key_BxLxNxD, num_kv_heads),
    start_Bxk,
    size=members + focal,
    focal=focal,
  )
  indices = block_indices(start_Bxk, chosen_BxNxkxf, members, key_BxLxNxD.shape[1])
  query_BxLxHxD, entries = merge_groups_xla(
    query_BxLxHxD,
    key_BxLxNxD,
    value_BxLxNxD,
    *indices,
    scale=scale,
    reorder_window=False,
    heads=heads,
  )
  return query_BxLxHxD, entries, chosen_BxNxkxf


def choose_in_blocks(
  query_BxLxHxD: Float[Array, "B L H D"],
  key_BxLxNxD: Float[Array, "B L N D"],
  start_Bxk: Int[Array, "B k"],
  *,
  size: int,
  focal: int,
) -> Int[Array, "B N k f"]:
  """Offsets in each block of the `focal` tokens that its last query attends to most, ascending.

  The score is softmax(q Kᵀ / √D) over the block's `size` tokens, summed over the query heads of a
  KV head; ties go to the earlier token. Not differentiable.

  Args:
    start_Bxk: first position of each block; L or more for no block.
    size: tokens of a block.
    focal: how many of them to choose.
  """
  B, _, N, D = key_BxLxNxD.shape
  k, R = start_Bxk.shape[1], query_BxLxHxD.shape[2] // N
  query, key = jax.lax.stop_gradient((query_BxLxHxD, key_BxLxNxD))
  position_Bxkxs = start_Bxk[..., None] + jnp.arange(size, dtype=jnp.int32)[None, None]
  key_BxkxsxNxD = take_positions(key, position_Bxkxs)
  query_BxkxNxRxD = take_positions(query, position_Bxkxs[..., -1]).reshape(B, k, N, R, D)
  return _highest(block_scores(query_BxkxNxRxD, key_BxkxsxNxD), focal)


def highest_in_blocks(
  scores_BxLxN: Float[Array, "B L N"], start_Bxk: Int[Array, "B k"], *, size: int, focal: int
) -> Int[Array, "B N k f"]:
  """Offsets in each block of the `focal` tokens with the highest scores, ascending.

  Ties go to the earlier token. Not differentiable.

  Args:
    scores_BxLxN: of every token and KV head; not NaN.
    start_Bxk: first position of each block; L or more for no block.
    size: tokens of a block.
    focal: how many of them to choose.
  """
  position_Bxkxs = start_Bxk[..., None] + jnp.arange(size, dtype=jnp.int32)[None, None]
  scores_BxkxsxN = take_positions(jax.lax.stop_gradient(scores_BxLxN), position_Bxkxs)
  return _highest(jnp.moveaxis(scores_BxkxsxN, -1, 1), focal)


def _highest(scores_BxNxkxs: Array, count: int) -> Int[Array, "B N k f"]:
  _, chosen_BxNxkxf = jax.lax.top_k(scores_BxNxkxs, count)
  return jnp.sort(chosen_BxNxkxf, axis=-1)


def block_scores(
  query: Float[Array, "*B N R D"], key: Float[Array, "*B s N D"]
) -> Float[Array, "B N *k s"]:
  """Attention of one query to each key of its block: softmax(q Kᵀ / √D), summed over R heads."""
  logits = einsum_float32("...nrd,...snd->...nrs", query, key)
  scores = jax.nn.softmax(logits / jnp.sqrt(jnp.float32(query.shape[-1])), axis=-1).sum(axis=-2)
  return jnp.moveaxis(scores, -2, 1)


def merge(
  query: Float[Array, "*B N R D"],
  key: Float[Array, "*B m N D"],
  value: Float[Array, "*B m N V"],
  *,
  scale: float,
) -> tuple[Float[Array, "*B N D"], Float[Array, "*B N V"]]:
  """Merges the m members of each group to one key and value (Eq. 14 of arXiv 2505.22107).

  w = softmax over members of scale · q·K_j, averaged over the R query heads of a KV head;
  Kᵍ = Σ_j w_j K_j and Vᵍ = Σ_j w_j V_j. Sums are float32, results have the input dtype.

  A NaN weight makes Kᵍ NaN and counts as 0 in Vᵍ. The value of a group that a query does not see
  must be finite, because 0 · NaN is NaN.
  """
  logits = einsum_float32("...nrd,...mnd->...nrm", query, key)
  weights = jax.nn.softmax(logits * scale, axis=-1).mean(axis=-2)

  def weighted(weights: Array, x: Array) -> Array:
    total = jnp.einsum("...nm,...mnd->...nd", weights, x.astype(jnp.float32), precision="highest")
    return total.astype(x.dtype)

  return weighted(weights, key), weighted(jnp.where(jnp.isnan(weights), 0, weights), value)
