"""What a complete block leaves in the cache: f focal tokens and the merge of the other m."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dga_jax.attention.aggregate import merge_scale
from dga_jax.config import DGAConfig
from pallas_kernels.summarise import block_scores, merge, take_rows


def summarise_blocks(
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
  by_rank_BxNxKxs = jnp.argsort(-scores_BxNxKxs, axis=-1, stable=True)
  # Members in position order, so that the merge sums as the prefill does.
  focal_BxNxKxf = jnp.sort(by_rank_BxNxKxs[..., :f], axis=-1)
  member_BxNxKxm = jnp.sort(by_rank_BxNxKxs[..., f:], axis=-1)

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
