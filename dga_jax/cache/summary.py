"""The compact entries of a complete block: f focal tokens and the merge of the other m.

The rule is the one of `pallas_kernels.group_merge.merge_blocks`, and this module calls the same
functions. Only the ranking differs: a decoding step ranks one block per sequence at every token,
whether or not the token completes the block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention.attend import merge_scale
from dga_jax.config import DGAConfig
from pallas_kernels.gather import take_rows
from pallas_kernels.group_merge import block_indices, block_scores, merge


def block_entries(
  query_BxKxHxD: Float[Array, "B K H D"],
  key_BxKxsxNxD: Float[Array, "B K s N D"],
  value_BxKxsxNxD: Float[Array, "B K s N D"],
  config: DGAConfig,
  scores_BxNxKxs: Float[Array, "B N K s"] | None = None,
) -> tuple[Float[Array, "B K F N D"], Float[Array, "B K F N D"]]:
  """Keys and values of the F = f + 1 compact entries of K blocks.

  The f tokens of a block with the highest scores stay focal (ties: the earlier token). The last
  query of the block merges the other m by Eq. 14 of the paper.

  Args:
    query_BxKxHxD: the last query of each block.
    key_BxKxsxNxD: the s = m + f tokens of each block.
    value_BxKxsxNxD: likewise.
    config: its m, f and scale of the merge logits.
    scores_BxNxKxs: the focal scores of the tokens, from `comparable_scores`. None for the last
      query's softmax(q Kᵀ / √D) over the block, summed over the query heads of a KV head.
  """
  B, K, H, D = query_BxKxHxD.shape
  s, N = key_BxKxsxNxD.shape[2:4]
  q_BxKxNxRxD = query_BxKxHxD.reshape(B, K, N, H // N, D)
  if scores_BxNxKxs is None:
    scores_BxNxKxs = block_scores(q_BxKxNxRxD, key_BxKxsxNxD)
  chosen_BxNxKxf = highest(scores_BxNxKxs, config.focal_in_block)
  # Each block is a row of its own that begins at 0.
  chosen = chosen_BxNxKxf.swapaxes(1, 2).reshape(B * K, N, 1, -1)
  start = jnp.zeros((B * K, 1), jnp.int32)
  focal, member, _ = block_indices(start, chosen, config.group_size, s)

  def take(x_BxKxsxNxD: Array, index: Int[Array, "BK N S"]) -> Float[Array, "B K S N D"]:
    return take_rows(x_BxKxsxNxD.reshape(B * K, s, N, D), index).reshape(B, K, -1, N, D)

  groups = merge(
    q_BxKxNxRxD,
    take(key_BxKxsxNxD, member[:, :, 0]),
    take(value_BxKxsxNxD, member[:, :, 0]),
    scale=merge_scale(config, D),
  )
  key, value = (
    jnp.concatenate([take(x, focal), group[:, :, None]], axis=2)
    for x, group in zip((key_BxKxsxNxD, value_BxKxsxNxD), groups, strict=True)
  )
  return key, value


def highest(scores: Float[Array, "*B s"], count: int) -> Int[Array, "*B k"]:
  """Positions of the `count` highest scores, ascending; of equal scores the earlier count.

  Every score is compared with every other. Compiled for a TPU this takes no temporary memory, where
  `top_k` and a sort of so few scores are padded to whole tiles. `merge_blocks` uses `top_k`: on a
  CPU, the s² comparisons of every block of a prompt take more memory and time.
  """
  mine, other = jnp.broadcast_arrays(scores[..., :, None], scores[..., None, :])
  is_before = _iota(mine, -1) < _iota(mine, -2)
  # Either all scores are NaN or none. NaN is not less than NaN, so that the first ones count.
  is_ahead = (other > mine) | (is_before & ~(other < mine))
  is_high = is_ahead.sum(axis=-1) < count
  rank = jnp.where(is_high, jnp.cumsum(is_high, axis=-1, dtype=jnp.int32) - 1, count)
  rank = jnp.broadcast_to(rank[..., None, :], (*scores.shape[:-1], count, scores.shape[-1]))
  return jnp.where(rank == _iota(rank, -2), _iota(rank, -1), 0).sum(axis=-1, dtype=jnp.int32)


def _iota(like: Array, axis: int) -> Array:
  return jax.lax.broadcasted_iota(jnp.int32, like.shape, axis % like.ndim)
