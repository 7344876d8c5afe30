"""Selection by a sort of (range, −score, position). Runs anywhere, and is the oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.segmented_top_k.segments import Ranges


def segmented_top_k_xla(
  scores_BxNxL: Float[Array, "B N L"], ranges: Ranges
) -> Bool[Array, "B N L"]:
  """See `segmented_top_k`."""
  B, N, L = scores_BxNxL.shape
  inside_BxCxL = ranges.inside(L)
  in_any_BxL = inside_BxCxL.any(axis=1)
  range_BxL = jnp.where(in_any_BxL, jnp.argmax(inside_BxCxL, axis=1), inside_BxCxL.shape[1])
  range_BxNxL = jnp.broadcast_to(range_BxL[:, None], (B, N, L))
  i_BxNxL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, N, L))
  *_, by_rank_BxNxL = jax.lax.sort((range_BxNxL, -scores_BxNxL, i_BxNxL), num_keys=3)
  rank_BxNxL = jnp.put_along_axis(
    jnp.zeros_like(i_BxNxL),
    by_rank_BxNxL,
    i_BxNxL,
    axis=-1,
    inplace=False,
    mode="promise_in_bounds",
  )
  # The sort puts the members of a range behind those of all ranges before it.
  before_BxC = jnp.cumsum(ranges.length, axis=1) - ranges.length
  last_rank_BxC = before_BxC + jnp.minimum(ranges.quota, ranges.length)
  last_rank_BxL = jnp.take_along_axis(
    last_rank_BxC, jnp.minimum(range_BxL, inside_BxCxL.shape[1] - 1), axis=1
  )
  return (rank_BxNxL < last_rank_BxL[:, None]) & in_any_BxL[:, None]
