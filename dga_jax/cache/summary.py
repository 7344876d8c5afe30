"""What a complete block leaves in the cache: f focal tokens and the merge of the other m."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dga_jax.attention.aggregate import merge_scale
from dga_jax.config import DGAConfig
from pallas_kernels.gather import take_rows
from pallas_kernels.group_merge import block_scores, merge


def merge_blocks(
  query_BxKxHxD: Float[Array, "B K H D"],
  key_BxKxsxNxD: Float[Array, "B K s N D"],
  value_BxKxsxNxD: Float[Array, "B K s N D"],
  config: DGAConfig,
) -> tuple[Float[Array, "B K F N D"], Float[Array, "B K F N D"]]:
  """Keys and values of the F = f + 1 entries of K blocks, each chosen by its last query."""
  B, K, H, D = query_BxKxHxD.shape
  N, f = key_BxKxsxNxD.shape[-2], config.focal_in_block
  q_BxKxNxRxD = query_BxKxHxD.reshape(B, K, N, H // N, D)
  scores_BxNxKxs = block_scores(q_BxKxNxRxD, key_BxKxsxNxD)
  is_focal_BxNxKxs = _is_among_highest(scores_BxNxKxs, f)
  focal_BxNxKxf = _places(is_focal_BxNxKxs, f)
  member_BxNxKxm = _places(~is_focal_BxNxKxs, scores_BxNxKxs.shape[-1] - f)

  def take(x_BxKxsxNxD: Array, index_BxNxKxS: Array) -> Array:
    flat = take_rows(
      x_BxKxsxNxD.reshape(B * K, *x_BxKxsxNxD.shape[2:]),
      index_BxNxKxS.swapaxes(1, 2).reshape(B * K, N, -1),
    )
    return flat.reshape(B, K, -1, N, D)

  groups = merge(
    q_BxKxNxRxD,
    take(key_BxKxsxNxD, member_BxNxKxm),
    take(value_BxKxsxNxD, member_BxNxKxm),
    scale=merge_scale(config, D),
  )
  key, value = (
    jnp.concatenate([take(x, focal_BxNxKxf), group[:, :, None]], axis=2)
    for x, group in zip((key_BxKxsxNxD, value_BxKxsxNxD), groups, strict=True)
  )
  return key, value


def _is_among_highest(scores: Float[Array, "*B s"], count: int) -> Bool[Array, "*B s"]:
  """The `count` highest scores, of equal ones the first.

  Each is compared with each: a TPU pads a sort of so few to whole tiles.
  """
  mine, other = jnp.broadcast_arrays(scores[..., :, None], scores[..., None, :])
  is_before = _iota(mine, -1) < _iota(mine, -2)
  # Scores are NaN all or none: of NaN no one is lower, and so the first are taken.
  is_ahead = (other > mine) | (is_before & ~(other < mine))
  return is_ahead.sum(axis=-1) < count


def _places(marked: Bool[Array, "*B s"], count: int) -> Int[Array, "*B S"]:
  """Where the `count` marked ones are, ascending, so that the merge sums as the prefill does."""
  number = jnp.where(marked, jnp.cumsum(marked, axis=-1) - 1, count)
  number = jnp.broadcast_to(number[..., None, :], (*marked.shape[:-1], count, marked.shape[-1]))
  is_place = number == _iota(number, -2)
  return jnp.where(is_place, _iota(number, -1), 0).sum(axis=-1)


def _iota(like: Array, axis: int) -> Array:
  return jax.lax.broadcasted_iota(jnp.int32, like.shape, axis % like.ndim)
