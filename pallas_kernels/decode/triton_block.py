"""The new token's own block in the Triton decoding step: append, attend, and flush when complete.

Letters: M query heads of a KV head, rounded up; R of them exist. S tokens of a block, rounded up.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode.cache_arrays import BlockRule, CacheArrays
from pallas_kernels.decode.cache_layout import CacheLayout, TokenCoords
from pallas_kernels.decode.triton_tile import load_rows, MIN_DOT_SIDE, store_rows
from pallas_kernels.kernel_common import MASK_VALUE
from pallas_kernels.triton_common import padded_slice


class OwnBlock(NamedTuple):
  """The tokens of a block up to the new one, then zeros."""

  token: TokenCoords  # the new one
  is_new: Array  # [S]
  key: Array  # [S, D]
  value: Array  # [S, D]
  score: Array | None  # [S], focal scores; None where the last query chooses


def load_block(
  cache: CacheArrays,
  layer: Array,
  token: TokenCoords,
  key_ref: Any,
  value_ref: Any,
  score: Array | None,
  layout: CacheLayout,
) -> OwnBlock:
  """Reads the earlier tokens of the block from the ring, and the new one from its references."""
  S = max(MIN_DOT_SIDE, pl.next_power_of_2(layout.block_size))
  is_new_S = jnp.arange(S) == token.offset

  def with_new(ring_ref: Any, new_ref: Any) -> Array:
    new_D = new_ref[...]
    earlier_SxD = load_rows(ring_ref, (layer,), token.block_slot, S, token.slot)
    return jnp.where(is_new_S[:, None], new_D[None], earlier_SxD)

  key_SxD = with_new(cache.raw_key, key_ref)
  value_SxD = with_new(cache.raw_value, value_ref)
  if score is None:
    return OwnBlock(token, is_new_S, key_SxD, value_SxD, None)
  # Tokens of the prefix have offset 0, so that nothing is loaded for them.
  earlier_S = plgpu.load(_score_row(cache, layer, S), mask=jnp.arange(S) < token.offset, other=0.0)
  return OwnBlock(token, is_new_S, key_SxD, value_SxD, jnp.where(is_new_S, score, earlier_S))


def _score_row(cache: CacheArrays, layer: Array, size: int) -> Any:
  """The references of a block's focal scores."""
  block_score: Any = cache.block_score
  return block_score.at[layer, padded_slice(0, size)]


def append_token(out: CacheArrays, layer: Array, block: OwnBlock) -> None:
  """Writes the new token to the ring, or to the prefix where it belongs to no block."""
  token, offset_S = block.token, jnp.arange(block.is_new.shape[0])
  to_ring_S = block.is_new & token.in_block
  to_prefix_S = block.is_new & ~token.in_block
  entry_S = token.position + (offset_S - token.offset)
  for rows_SxD, raw_ref, compact_ref, scale_ref in (
    (block.key, out.raw_key, out.compact_key, out.key_scale),
    (block.value, out.raw_value, out.compact_value, out.value_scale),
  ):
    store_rows(raw_ref, None, layer, token.block_slot + offset_S, rows_SxD, to_ring_S)
    store_rows(compact_ref, scale_ref, layer, entry_S, rows_SxD, to_prefix_S)
  if block.score is not None:
    plgpu.store(_score_row(out, layer, block.score.shape[0]), block.score, mask=to_ring_S)


def flush_block(
  out: CacheArrays,
  layer: Array,
  block: OwnBlock,
  dots_MxS: Array,
  prefix: Array,
  *,
  rule: BlockRule,
  heads: int,
) -> None:
  """Writes the compact entries of the complete block: f focal tokens, then the group.

  Args:
    dots_MxS: products of the last query's heads with the block's keys, not scaled.
    prefix: compact entries of the sequence's prefix.
    rule: how the block is summarized.
    heads: R.
  """
  layout, offset_S = rule.layout, jnp.arange(block.is_new.shape[0])
  first = layout.block_entry(block.token.block, prefix)
  focal_S, weight_S = _choose_focal(dots_MxS, block.score, rule, heads)
  rank_S = jnp.cumsum(focal_S.astype(jnp.int32)) - 1
  # NaN weights count as 0 in a value; see `group_merge.xla.merge`.
  value_weight_S = jnp.where(weight_S == weight_S, weight_S, 0.0)
  for rows_SxD, own_weight_S, compact_ref, scale_ref in (
    (block.key, weight_S, out.compact_key, out.key_scale),
    (block.value, value_weight_S, out.compact_value, out.value_scale),
  ):
    store_rows(compact_ref, scale_ref, layer, first + rank_S, rows_SxD, focal_S)
    group_D = (own_weight_S[:, None] * rows_SxD.astype(jnp.float32)).sum(axis=0)
    group_SxD = jnp.broadcast_to(group_D[None], rows_SxD.shape).astype(rows_SxD.dtype)
    entry_S = first + layout.focal + offset_S
    store_rows(compact_ref, scale_ref, layer, entry_S, group_SxD, offset_S == 0)


def _choose_focal(
  dots_MxS: Array, score_S: Array | None, rule: BlockRule, heads: int
) -> tuple[Array, Array]:
  """Which tokens of a block are focal, and the weights [S] that merge the other tokens."""
  M, S = dots_MxS.shape
  layout, offset_S = rule.layout, jnp.arange(S)
  is_token_S, is_head_Mx1 = offset_S < layout.block_size, (jnp.arange(M) < heads)[:, None]
  if score_S is None:
    score_S = _summed_softmax(dots_MxS * rule.choice_scale, is_token_S, is_head_Mx1)
  focal_S = jnp.zeros((S,), jnp.bool_)
  for _ in range(layout.focal):
    is_left_S = is_token_S & ~focal_S
    left_S = jnp.where(is_left_S, score_S, -jnp.inf)
    best = jnp.where(is_left_S & (left_S == left_S.max()), offset_S, S).min()
    focal_S |= offset_S == best
  is_member_S = is_token_S & ~focal_S
  weight_S = _summed_softmax(dots_MxS * rule.merge_scale, is_member_S, is_head_Mx1) / heads
  return focal_S, weight_S


def _summed_softmax(logits_MxS: Array, keep_S: Array, is_head_Mx1: Array) -> Array:
  """[S]: the softmax of each query head over the kept tokens, summed over the heads."""
  logits_MxS = jnp.where(keep_S[None], logits_MxS, MASK_VALUE)
  exp_MxS = jnp.exp(logits_MxS - logits_MxS.max(axis=1)[:, None])
  exp_MxS = jnp.where(keep_S[None] & is_head_Mx1, exp_MxS, 0.0)
  l_M = exp_MxS.sum(axis=1)
  return (exp_MxS / jnp.where(l_M == 0, 1.0, l_M)[:, None]).sum(axis=0)
