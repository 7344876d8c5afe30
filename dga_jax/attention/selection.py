"""Selection: which tokens are focal, that is, keep their own key and value."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dga_jax.attention.segments import Documents
from dga_jax.attention.streaming_blocks import StreamingBlocks
from dga_jax.config import DGAConfig
from pallas_kernels.segmented_top_k import segmented_top_k, Segments


class Selection(NamedTuple):
  """The choice of focal tokens, for each KV head on its own."""

  focal_mask: Bool[Array, "B N L"]


def document_quotas(documents: Documents, max_documents: int, config: DGAConfig) -> Segments:
  """Start, length and number of focal tokens of every document (global and random selection)."""
  start_BxC, length_BxC = documents.extents(max_documents)
  quota_L = jnp.asarray(config.focal_quota(documents.index.shape[1]))
  return Segments(start_BxC, length_BxC, quota_L[length_BxC])


def select_by_score(
  scores_BxNxL: Float[Array, "B N L"], documents: Documents, quotas: Segments, config: DGAConfig
) -> Selection:
  """Global and random selection: the highest scores of each document.

  A document's first `sink_tokens` tokens are selected before all others. Ties go to the earlier
  position.
  """
  if config.sink_tokens:
    is_sink_BxL = documents.position < config.sink_tokens
    scores_BxNxL = jnp.where(is_sink_BxL[:, None], jnp.inf, scores_BxNxL)
  return Selection(segmented_top_k(scores_BxNxL, quotas))


def comparable_scores(focal_scores: Float[Array, "*B N"]) -> Float[Array, "*B N"]:
  """Focal scores that every backend orders alike: 8 significant bits, NaN as +∞ and −0 as 0.

  Equal tokens of a block have equal scores but for rounding errors, which differ between prefill
  and decoding. After rounding to the bits of bfloat16 such scores are equal, and the earlier token
  precedes the later one in both. No gradient flows.
  """
  scores = jax.lax.stop_gradient(focal_scores)
  scores = jax.lax.reduce_precision(scores, exponent_bits=8, mantissa_bits=7)
  return jnp.where(jnp.isnan(scores), jnp.inf, jnp.where(scores == 0, 0.0, scores))


def select_in_blocks(chosen_BxNxkxf: Int[Array, "B N k f"], blocks: StreamingBlocks) -> Selection:
  """Streaming selection: the sinks, and the chosen tokens of every complete block.

  Args:
    chosen_BxNxkxf: offsets in each block of its focal tokens.
    blocks: the blocks, k of them.
  """
  (B, N, _, _), L = chosen_BxNxkxf.shape, blocks.is_sink.shape[1]
  position_BxNxkf = (blocks.start[:, None, :, None] + chosen_BxNxkxf).reshape(B, N, -1)
  row_Bx1x1, head_1xNx1 = jnp.arange(B)[:, None, None], jnp.arange(N)[None, :, None]
  # One more entry takes the tokens of absent blocks, whose start is L: the scatter must stay
  # inside its array (pallas_kernels/compact_indices/xla.py).
  is_sink_BxNxL = jnp.broadcast_to(blocks.is_sink[:, None], (B, N, L))
  mask = jnp.pad(is_sink_BxNxL, ((0, 0), (0, 0), (0, 1)))
  mask = mask.at[row_Bx1x1, head_1xNx1, jnp.minimum(position_BxNxkf, L)].set(
    True, mode="promise_in_bounds"
  )
  return Selection(mask[..., :L])
