"""The paper's masks written out, in float32: the definition that every implementation is held to.

From the code that it judges it imports nothing: documents, blocks, masks and softmax are derived
here anew from the specification, one L×L mask at a time. It takes the focal mask, the config's
fields and the rows. A group is named by the position of its first member, so there are L slots for
groups, most of them empty.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dga_jax.config import DGAConfig


class Masks(NamedTuple):
  """One row and KV head; G = L slots for groups."""

  member: Bool[Array, "G L"]  # token j is a member of the group whose first member is g
  merge_query: Int[Array, "G"]  # the query whose attention weighs the members of g
  sees_token: Bool[Array, "L L"]  # query i sees the raw token j
  sees_group: Bool[Array, "L G"]  # query i sees the group g


def reference_attention(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  focal_mask: Bool[Array, "B N L"],
  document: Int[Array, "B L"],
  *,
  config: DGAConfig,
  scale: float,
) -> Float[Array, "B L H D"]:
  """Dynamic Group Attention with L×L masks. Differentiable.

  Args:
    query: any float dtype, which all arrays share.
    key: N KV heads, N dividing H.
    value: as key.
    focal_mask: True for tokens that keep their own key and value.
    document: a number for the document of each token, −1 for padding, as from
      `number_documents`.
    config: settings of the mechanism.
    scale: multiplies the attention logits.

  Returns:
    The query's shape and dtype, computed in float32; 0 for padding.
  """
  B, L, H, D = query.shape
  N = key.shape[2]
  is_token_BxLx1x1 = (document >= 0)[..., None, None]
  query, key, value = (jnp.where(is_token_BxLx1x1, x, 0) for x in (query, key, value))

  def of_head(q_LxRxD: Array, k_LxD: Array, v_LxD: Array, focal_L: Array, docs: Array) -> Array:
    masks = write_masks(focal_L, docs, config)
    return _attend(q_LxRxD, k_LxD, v_LxD, masks, config, scale)

  of_row = jax.vmap(of_head, in_axes=(1, 1, 1, 0, None), out_axes=1)
  q_BxLxNxRxD = query.reshape(B, L, N, H // N, D)
  out_BxLxNxRxD = jax.vmap(of_row)(q_BxLxNxRxD, key, value, focal_mask, document)
  return out_BxLxNxRxD.reshape(B, L, H, D)


def reference_sink_window(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  document: Int[Array, "B L"],
  *,
  sinks: int,
  window: int,
  scale: float | Float[Array, ""] | None = None,
) -> Float[Array, "B L H D"]:
  """Attention to sinks and a sliding window with L×L masks. Differentiable.

  Args:
    query: any float dtype, which all arrays share.
    key: N KV heads, N dividing H.
    value: as key.
    document: from `number_documents`.
    sinks: first tokens of its document that a query sees.
    window: last tokens that a query sees, of those that are no sinks.
    scale: multiplies the attention logits, default 1/√D.

  Returns:
    The query's shape and dtype, computed in float32; 0 for padding.
  """
  L, H, D = query.shape[1:]
  N = key.shape[2]
  is_token_BxLx1x1 = (document >= 0)[..., None, None]
  query, key, value = (jnp.where(is_token_BxLx1x1, x, 0) for x in (query, key, value))
  i_L = jnp.arange(L)
  causal_LxL = i_L[:, None] >= i_L[None]

  def of_row(q_LxHxD: Array, k_LxNxD: Array, v_LxNxD: Array, document_L: Array) -> Array:
    same_LxL = _same_document(document_L)
    is_sink_L = (same_LxL & causal_LxL).sum(axis=1) <= sinks
    near_LxL = i_L[:, None] - i_L[None] < window
    sees_LxL = same_LxL & causal_LxL & (is_sink_L[None] | near_LxL)
    q_LxNxRxD, k, v = (
      x.astype(jnp.float32) for x in (q_LxHxD.reshape(L, N, H // N, D), k_LxNxD, v_LxNxD)
    )
    logits_NxRxLxL = jnp.einsum("inrd,jnd->nrij", q_LxNxRxD, k, precision="highest")
    weights = _softmax((D**-0.5 if scale is None else scale) * logits_NxRxLxL, sees_LxL[None, None])
    out = jnp.einsum("nrij,jnd->inrd", weights, v, precision="highest")
    return out.reshape(L, H, D).astype(q_LxHxD.dtype)

  return jax.vmap(of_row)(query, key, value, document)


def number_documents(
  batch: int,
  length: int,
  lengths: Int[Array, "B"] | Int[np.ndarray, "B"] | None,
  segment_ids: Int[Array, "B L"] | Int[np.ndarray, "B L"] | None,
) -> Int[Array, "B L"]:
  """A number for the document of each token, −1 for padding.

  A document is a maximal run of equal segment ids. Tokens at or beyond their row's length, and
  tokens with a negative id, are padding.
  """
  i_1xL = jnp.arange(length)[None]
  ids_BxL = jnp.zeros((batch, length), int) if segment_ids is None else jnp.asarray(segment_ids)
  length_Bx1 = jnp.full((batch, 1), length) if lengths is None else jnp.asarray(lengths)[:, None]
  begins_BxL = jnp.concatenate(
    [jnp.ones((batch, 1), bool), ids_BxL[:, 1:] != ids_BxL[:, :-1]], axis=1
  )
  is_token_BxL = (ids_BxL >= 0) & (i_1xL < length_Bx1)
  return jnp.where(is_token_BxL, begins_BxL.astype(jnp.int32).cumsum(axis=1), -1)


def write_masks(focal_L: Bool[Array, "L"], document_L: Int[Array, "L"], config: DGAConfig) -> Masks:
  """Sections 1 and 3 of the specification, literally, and `_bidirectional_masks`."""
  if not config.causal:
    return _bidirectional_masks(focal_L, document_L, config)
  if config.selection == "streaming":
    return _streaming_masks(focal_L, document_L, config)
  return _global_masks(focal_L, document_L, config)


def _global_masks(focal_L: Array, document_L: Array, config: DGAConfig) -> Masks:
  m = config.group_size
  i_L = jnp.arange(focal_L.size)
  same_LxL = _same_document(document_L)
  not_later_LxL = i_L[:, None] >= i_L[None, :]
  nonfocal_L = ~focal_L & (document_L >= 0)
  rank_L = (same_LxL & nonfocal_L[None] & not_later_LxL).sum(axis=1) - 1
  first_L = nonfocal_L & (rank_L % m == 0)
  member_GxL = (
    same_LxL & first_L[:, None] & nonfocal_L[None] & (rank_L[:, None] // m == rank_L[None, :] // m)
  )
  whole_G = member_GxL.sum(axis=1) == m
  last_G = jnp.where(member_GxL, i_L[None], -1).max(axis=1)
  if config.visibility == "inclusive":
    over_LxG = last_G[None] <= i_L[:, None]
  else:
    over_LxG = last_G[None] < i_L[:, None]
  sees_group_LxG = same_LxL & whole_G[None] & over_LxG
  # Raw members of the one group that has begun and that the query does not see merged.
  begun_LxG = same_LxL & first_L[None] & (i_L[None] <= i_L[:, None])
  unfinished_LxG = begun_LxG & ~sees_group_LxG
  complementary_LxL = (unfinished_LxG[:, :, None] & member_GxL[None]).any(axis=1)
  raw_LxL = (focal_L[None] & same_LxL) | (complementary_LxL & config.complementary)
  return Masks(
    member=member_GxL,
    merge_query=last_G,
    sees_token=raw_LxL & not_later_LxL,
    sees_group=sees_group_LxG,
  )


def _streaming_masks(focal_L: Array, document_L: Array, config: DGAConfig) -> Masks:
  m, f = config.group_size, config.focal_per_block
  size = m + (max(1, round(config.importance_rate * m)) if f is None else f)
  i_L = jnp.arange(focal_L.size)
  same_LxL = _same_document(document_L)
  not_later_LxL = i_L[:, None] >= i_L[None, :]
  after_sinks_L = (same_LxL & not_later_LxL).sum(axis=1) - 1 - config.sink_tokens
  sink_L = (document_L >= 0) & (after_sinks_L < 0)
  block_L = jnp.where(sink_L, -1, after_sinks_L // size)
  same_block_LxL = same_LxL & (block_L[:, None] == block_L[None, :]) & (block_L >= 0)[None]
  whole_L = same_block_LxL.sum(axis=1) == size
  nonfocal_L = ~focal_L & whole_L
  group_LxL = same_block_LxL & nonfocal_L[:, None] & nonfocal_L[None]
  first_L = nonfocal_L & ((group_LxL & not_later_LxL).sum(axis=1) == 1)
  member_GxL = group_LxL & first_L[:, None]
  block_end_G = jnp.where(same_block_LxL, i_L[None], -1).max(axis=1)
  near_LxL = same_LxL & (block_L[None] >= block_L[:, None] - config.local_window)
  kept_LxL = same_LxL & (focal_L & whole_L)[None]
  raw_LxL = (same_LxL & sink_L[None]) | near_LxL | kept_LxL
  return Masks(
    member=member_GxL,
    merge_query=block_end_G,
    sees_token=raw_LxL & not_later_LxL,
    sees_group=same_LxL & first_L[None] & ~near_LxL & not_later_LxL,
  )


def _bidirectional_masks(focal_L: Array, document_L: Array, config: DGAConfig) -> Masks:
  """Every query sees all tokens without a group, and every group: raw if near, else merged.

  Near are the group whose span contains the query, and `local_window` groups on both sides of it.
  """
  m, w = config.group_size, config.local_window
  i_L = jnp.arange(focal_L.size)
  same_LxL = _same_document(document_L)
  not_later_LxL = i_L[:, None] >= i_L[None, :]
  position_L = (same_LxL & not_later_LxL).sum(axis=1) - 1
  if config.selection == "streaming":
    f = config.focal_per_block
    size = m + (max(1, round(config.importance_rate * m)) if f is None else f)
    block_L = jnp.where(
      position_L < config.sink_tokens, -1, (position_L - config.sink_tokens) // size
    )
    same_block_LxL = same_LxL & (block_L[:, None] == block_L[None]) & (block_L >= 0)[None]
    nonfocal_L = ~focal_L & (same_block_LxL.sum(axis=1) == size)
    together_LxL = same_block_LxL & nonfocal_L[:, None] & nonfocal_L[None]
    merge_query = jnp.where(same_block_LxL, i_L[None], -1).max(axis=1)
  else:
    nonfocal_L = ~focal_L & (document_L >= 0)
    rank_L = (same_LxL & nonfocal_L[None] & not_later_LxL).sum(axis=1) - 1
    together_LxL = same_LxL & nonfocal_L[:, None] & nonfocal_L[None]
    together_LxL = together_LxL & (rank_L[:, None] // m == rank_L[None] // m)
    merge_query = jnp.where(together_LxL, i_L[None], -1).max(axis=1)
  is_member_L = together_LxL.sum(axis=1) == m
  first_L = is_member_L & ((together_LxL & not_later_LxL).sum(axis=1) == 1)
  member_GxL = together_LxL & first_L[:, None]
  last_G = jnp.where(member_GxL, i_L[None], -1).max(axis=1)
  group_LxG = same_LxL & first_L[None]
  begun_L = (group_LxG & not_later_LxL).sum(axis=1)
  ended_L = (group_LxG & (last_G[None] < i_L[:, None])).sum(axis=1)
  number_G = begun_L - 1  # Of a group in its document, counted at its first member.
  near_LxG = group_LxG & (number_G[None] >= ended_L[:, None] - w)
  near_LxG = near_LxG & (number_G[None] < begun_L[:, None] + w)
  group_of_L = member_GxL.argmax(axis=0)
  raw_LxL = near_LxG[:, group_of_L] & is_member_L[None] & config.complementary
  return Masks(
    member=member_GxL,
    merge_query=merge_query,
    sees_token=same_LxL & (raw_LxL | ~is_member_L[None]),
    sees_group=group_LxG & ~near_LxG,
  )


def _same_document(document_L: Array) -> Array:
  return (document_L[:, None] == document_L[None, :]) & (document_L >= 0)[None]


def _attend(
  q_LxRxD: Array, k_LxD: Array, v_LxD: Array, masks: Masks, config: DGAConfig, scale: float
) -> Array:
  dtype = q_LxRxD.dtype
  q_LxRxD, k_LxD, v_LxD = (x.astype(jnp.float32) for x in (q_LxRxD, k_LxD, v_LxD))
  merge_scale = q_LxRxD.shape[-1] ** -0.5 if config.aggregation_scale == "head_dim" else 1.0
  q_GxRxD = q_LxRxD[masks.merge_query]
  weights_GxRxL = _softmax(
    merge_scale * jnp.einsum("grd,ld->grl", q_GxRxD, k_LxD, precision="highest"),
    masks.member[:, None],
  )
  weights_GxL = weights_GxRxL.mean(axis=1)
  # A group is stored in the input's dtype.
  group_key_GxD = jnp.dot(weights_GxL, k_LxD, precision="highest").astype(dtype)
  group_value_GxD = jnp.dot(weights_GxL, v_LxD, precision="highest").astype(dtype)

  keys_SxD = jnp.concatenate([k_LxD, group_key_GxD.astype(jnp.float32)])
  values_SxD = jnp.concatenate([v_LxD, group_value_GxD.astype(jnp.float32)])
  sees_LxS = jnp.concatenate([masks.sees_token, masks.sees_group], axis=1)
  logits_LxRxS = scale * jnp.einsum("lrd,sd->lrs", q_LxRxD, keys_SxD, precision="highest")
  if config.group_logit_bias == "log_size":
    is_group_S = jnp.arange(keys_SxD.shape[0]) >= k_LxD.shape[0]
    logits_LxRxS += jnp.where(is_group_S, float(np.log(config.group_size)), 0.0)[None, None]
  attention_LxRxS = _softmax(logits_LxRxS, sees_LxS[:, None])
  return jnp.einsum("lrs,sd->lrd", attention_LxRxS, values_SxD, precision="highest").astype(dtype)


def _softmax(logits: Array, mask: Array) -> Array:
  """Softmax over the last axis where the mask holds; 0 elsewhere and in rows without any."""
  logits = jnp.where(mask, logits, -jnp.inf)
  largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  weights = jnp.exp(logits - jnp.where(jnp.isneginf(largest), 0, largest))
  total = weights.sum(axis=-1, keepdims=True)
  return weights / jnp.where(total == 0, 1, total)
