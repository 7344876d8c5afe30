"""The decoding ops and their dispatch: attention over a compact cache, and whole steps in place."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.decode.cache_arrays import (
  BlockRule,
  CacheArrays,
  CacheLengths,
  CompactHeads,
  GroupBias,
  HeadCache,
  TokenRows,
)
from pallas_kernels.decode.cache_layout import CacheMask
from pallas_kernels.triton_common import head_refusal

_MOST_ROWS = 128  # of a block: more do not fit a kernel's registers


def decode_attention(
  query: Float[Array, "B H D"],
  cache: CacheArrays,
  layer: Int[Array, ""] | int,
  mask: CacheMask,
  *,
  scale: float,
  group_bias: GroupBias | None = None,
  implementation: dispatch.Implementation = None,
) -> Float[Array, "B H D"]:
  """One softmax per query over the compact entries and raw tokens that its sequence sees.

  With s over the visible entries of the cache, and KV head n = ⌊h / (H/N)⌋ of query head h:

      out_h = Σ_s softmax_s(scale · q_h·k_ns + bias_s) v_ns

  The softmax statistics and the sums are float32. A sequence that sees nothing gives 0.

  Args:
    query: one token of each sequence; any float dtype, the dtype of all arrays.
    cache: the arrays of all layers, [layers, B, N, C or W, D], so that no layer is copied out.
      Entries in 8 bits are not read: unpack them first (`CacheArrays.unpack`).
    layer: the layer that is read.
    mask: what each sequence sees; its fields are int [B].
    scale: of the logits.
    group_bias: added to the logits of groups; None for no bias.
    implementation: "mosaic_tpu" (TPUs) or "xla" (any device); a tuple of names in order of
      preference; None for the first that can run the call.

  Returns:
    [B, H, D] in the dtype of the query.

  Raises:
    ValueError: if a name is unknown, or the cache is in 8 bits.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  if cache.key_scale is not None:
    raise ValueError(
      f"cache.compact_key is {cache.compact_key.dtype} with scales; decode_attention wants entries"
      " in the query's dtype: pass cache.unpack(layer), with layer=0."
    )
  options = {"scale": scale, "group_bias": group_bias}
  out_BxHxD: Array = dispatch.run(
    "decode_attention", implementation, query, cache, layer, mask, **options
  )
  return out_BxHxD


def step_in_place(
  query: Float[Array, "B H D"],
  key: Float[Array, "B N D"],
  value: Float[Array, "B N D"],
  cache: CacheArrays,
  lengths: CacheLengths,
  layer: Int[Array, ""] | int,
  score: Float[Array, "B N"] | None = None,
  *,
  rule: BlockRule,
  scale: float,
  group_bias: float = 0.0,
) -> tuple[Float[Array, "B H D"], CacheArrays, Int[Array, "layers B"]]:
  """Appends a token to every sequence, attends, and writes the entries of completed blocks.

  Computes `decode_attention` over what the new token sees, itself included, in one pass over the
  cache, and updates the cache in place. Requires that `has_step_kernel` returned True.

  Args:
    query: of the new tokens.
    key: of the new tokens. A token before its sequence's origin enters the prefix, another one the
      ring of raw tokens.
    value: likewise.
    cache: the arrays of all layers. Donate them.
    lengths: of all layers, before this token.
    layer: the layer that is read and written.
    score: the focal scores of the new tokens, float32 without NaN, where the cache has
      `block_score`; else None.
    rule: the layout of the cache, and how a complete block becomes compact entries.
    scale: of the attention logits.
    group_bias: added to the logits of groups.

  Returns:
    The output of attention, the cache, and the new lengths.
  """
  from pallas_kernels.decode.triton_step import step_triton

  return step_triton(
    query, key, value, cache, lengths, layer, score, rule=rule, scale=scale, group_bias=group_bias
  )


def dense_step(
  query: Float[Array, "B H D"],
  key: Float[Array, "B N D"],
  value: Float[Array, "B N D"],
  tokens: TokenRows,
  length: Int[Array, "layers B"],
  layer: Int[Array, ""] | int,
  *,
  scale: float,
  implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "B H D"], TokenRows, Int[Array, "layers B"]]:
  """Appends a token to every sequence and attends to all tokens of the sequence, itself included.

  out_h = Σ_s softmax_s(scale · q_h·k_ns) v_ns over the tokens s, KV head n = ⌊h / (H/N)⌋. The
  softmax statistics are float32. Of rows in 8 bits, those of the new token included, the stored
  numbers times their scale are read.

  Args:
    query: of the new tokens; any float dtype, the dtype of all arrays but those in 8 bits.
    key: of the new tokens.
    value: of the new tokens.
    tokens: M entries for each sequence and head, of all layers. Donate the arrays: the step updates
      them in place.
    length: tokens of each sequence before this one. A token beyond M is not stored, and the output
      of its sequence has no meaning.
    layer: the layer that is read and written.
    scale: of the logits.
    implementation: "triton" (Ampere and newer GPUs) or "xla" (any device); a tuple of names in
      order of preference; None for the first that can run the call.

  Returns:
    The output of attention, the cached tokens, and the lengths with one more token.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  stepped: tuple[Array, TokenRows, Array] = dispatch.run(
    "dense_decode_step", implementation, query, key, value, tokens, length, layer, scale=scale
  )
  return stepped


def has_step_kernel(
  query: Float[Array, "B H D"],
  cache: CacheArrays,
  rule: BlockRule,
  implementation: dispatch.Implementation,
) -> bool:
  """Whether `step_in_place` can compute this call.

  Args:
    query: of the call, as `cache` and `rule` are.
    implementation: "triton" for `step_in_place`, "mosaic_tpu" or "xla" for `decode_attention`; a
      tuple of names in order of preference; None for the first that can run the call.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  return dispatch.choose("decode_step", implementation, query, cache, rule) == "triton"


def step_refusal(query: Array, cache: CacheArrays, rule: BlockRule) -> str | None:
  """Why the Triton kernels of a whole step cannot run a call; None if they can."""
  if reason := head_refusal(query):
    return reason
  if rule.layout.block_size > _MOST_ROWS:
    return (
      f"a block has {rule.layout.block_size} tokens; at most {_MOST_ROWS} fit a kernel's registers"
    )
  if 0 in cache.compact_key.shape:
    return "the cache has no compact entries"
  return None


def attention_refusal(query: Array, cache: CacheArrays, *_: Any, **options: Any) -> str | None:
  """Why the TPU kernel cannot run `decode_attention`, alone or in a step; None if it can."""
  del options
  if str(query.dtype) not in ("bfloat16", "float32"):
    return f"dtype is {query.dtype}; it must be bfloat16 or float32"
  if 0 in cache.compact_key.shape:
    return "the cache has no compact entries"
  return None


def heads_step(
  query: Float[Array, "B H D"],
  key: Float[Array, "B N D"],
  value: Float[Array, "B N D"],
  classes: Sequence[HeadCache],
  layer: Int[Array, ""] | int,
  score: Float[Array, "B N"] | None = None,
  *,
  scale: float,
) -> tuple[Float[Array, "B H D"], list[tuple[Any, Int[Array, "layers B"]]]]:
  """Appends a token to every sequence and attends, for heads with caches of several kinds.

  Computes, for the heads of each class, `step_in_place` or `dense_step`, or attention to the sinks
  and the window of a ring, in one kernel for all heads. Requires that `has_heads_kernel` returned
  True.

  Args:
    query: of the new tokens; any float dtype.
    key: of the new tokens.
    value: of the new tokens.
    classes: the caches of all KV heads, which are updated in place: donate them. The classes have
      equal lengths.
    layer: the layer that is read and written.
    score: focal scores of the new tokens, float32 without NaN, where a class has `block_score`;
      else None.
    scale: of the attention logits.

  Returns:
    The output of attention, and for each class its arrays and its lengths with one more token.
  """
  from pallas_kernels.decode.triton_heads import heads_step_triton

  return heads_step_triton(query, key, value, classes, layer, score, scale=scale)


def has_heads_kernel(query: Float[Array, "B H D"], classes: Sequence[HeadCache] | None) -> bool:
  """Whether `heads_step` can compute this call; else each class decodes by itself.

  Args:
    query: of the call.
    classes: likewise; None where the heads of a setting are not adjacent.
  """
  return dispatch.choose("decode_heads", None, query, classes) == "triton"


def heads_step_refusal(query: Array, classes: Sequence[HeadCache] | None) -> str | None:
  """Why the Triton kernel of `heads_step` cannot run a call; None if it can."""
  if reason := head_refusal(query):
    return reason
  if classes is None:
    return "the heads of a setting are not adjacent"
  for one in classes:
    if 0 in [x.size for x in jax.tree.leaves(one.arrays)]:
      return "a cache has an empty array"
    if isinstance(one, CompactHeads) and (reason := step_refusal(query, one.arrays, one.rule)):
      return reason
  return None
