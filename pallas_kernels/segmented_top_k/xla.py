"""Segmented top-k by one sort of (segment, −score, position). Runs on any device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.segmented_top_k.segments import Segments


def segmented_top_k_xla(
  scores_BxNxL: Float[Array, "B N L"], segments: Segments
) -> Bool[Array, "B N L"]:
  """See `segmented_top_k`."""
  B, N, L = scores_BxNxL.shape
  inside_BxCxL = segments.inside(L)
  C = inside_BxCxL.shape[1]
  in_any_BxL = inside_BxCxL.any(axis=1)
  segment_BxL = jnp.where(in_any_BxL, jnp.argmax(inside_BxCxL, axis=1), C)
  segment_BxNxL = jnp.broadcast_to(segment_BxL[:, None], (B, N, L))
  i_BxNxL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, N, L))
  *_, by_rank_BxNxL = jax.lax.sort((segment_BxNxL, -scores_BxNxL, i_BxNxL), num_keys=3)
  rank_BxNxL = jnp.put_along_axis(
    jnp.zeros_like(i_BxNxL),
    by_rank_BxNxL,
    i_BxNxL,
    axis=-1,
    inplace=False,
    mode="promise_in_bounds",
  )
  # The ranks of a segment's members follow those of all segments before it.
  before_BxC = jnp.cumsum(segments.length, axis=1) - segments.length
  last_rank_BxC = before_BxC + jnp.minimum(segments.quota, segments.length)
  last_rank_BxL = jnp.take_along_axis(last_rank_BxC, jnp.minimum(segment_BxL, C - 1), axis=1)
  return (rank_BxNxL < last_rank_BxL[:, None]) & in_any_BxL[:, None]
