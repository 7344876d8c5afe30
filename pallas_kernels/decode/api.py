"""The entries to decoding: attention alone, or a whole step; they pick the implementation."""

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.decode.cache_arrays import (
  BlockRule,
  CacheArrays,
  CacheLengths,
  CacheMask,
  GroupBias,
)
from pallas_kernels.triton_common import head_refusal

_MOST_ROWS = 128  # of a block: more do not fit a kernel's registers


def decode_attention(
  query: Float[Array, "B H D"],
  compact_key: Float[Array, "layers B N C D"],
  compact_value: Float[Array, "layers B N C D"],
  raw_key: Float[Array, "layers B N W D"],
  raw_value: Float[Array, "layers B N W D"],
  layer: Int[Array, ""] | int,
  visible: CacheMask,
  *,
  scale: float,
  group_bias: GroupBias | None = None,
  implementation: dispatch.Implementation = None,
) -> Float[Array, "B H D"]:
  """One softmax per query over what its sequence sees of one layer's cache.

  With s over the visible compact entries and raw tokens, and KV head n = ⌊h / (H/N)⌋:

      out = Σ_s softmax_s(scale · q·k_s + bias_s) v_s

  Softmax statistics and sums are float32. A sequence that sees nothing gives 0.

  Args:
    query: one token of each sequence; any float dtype, which all arrays share.
    compact_key: focal tokens and groups of all layers, so that no layer has to be taken out.
    compact_value: likewise.
    raw_key: the buffer of raw tokens.
    raw_value: likewise.
    layer: which layer is read.
    visible: what each sequence sees.
    scale: of the logits.
    group_bias: what is added to the logits of groups; None for nothing.
    implementation: "mosaic_tpu" (TPUs) or "xla" (any device); a tuple of names in order of
      preference; None for the first that can run the call.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  arrays = (query, compact_key, compact_value, raw_key, raw_value, layer, visible)
  options = {"scale": scale, "group_bias": group_bias}
  out_BxHxD: Array = dispatch.run("decode_attention", implementation, *arrays, **options)
  return out_BxHxD


def step_in_place(
  query: Float[Array, "B H D"],
  key: Float[Array, "B N D"],
  value: Float[Array, "B N D"],
  store: CacheArrays,
  progress: CacheLengths,
  layer: Int[Array, ""] | int,
  *,
  blocks: BlockRule,
  scale: float,
  group_bias: float = 0.0,
) -> tuple[Float[Array, "B H D"], CacheArrays, Int[Array, "layers B"]]:
  """Appends a token to every sequence, attends, and summarises the blocks that it completes.

  What `decode_attention` does over the entries of complete blocks before the window and over the
  raw tokens, the new one included, and what comes before and after it, in one go over the cache
  and in place. Only where `has_step_kernel` says so.

  Args:
    query: of the new tokens.
    key: of the new tokens; a sequence's first ones, up to its origin, go to its prefix.
    value: likewise.
    store: the cache. Donate it.
    progress: before this token.
    layer: which layer's part is read and written.
    blocks: what a block is, and what becomes of it.
    scale: of the attention logits.
    group_bias: added to the logits of groups.

  Returns:
    The attention's output, the cache, and the lengths.
  """
  from pallas_kernels.decode.triton_step import step_triton

  return step_triton(
    query, key, value, store, progress, layer, blocks=blocks, scale=scale, bias=group_bias
  )


def has_step_kernel(
  query: Float[Array, "B H D"],
  store: CacheArrays,
  blocks: BlockRule,
  implementation: dispatch.Implementation,
) -> bool:
  """Whether `step_in_place` serves this call.

  Args:
    query: of the call, like `store` and `blocks`.
    implementation: "triton" for it, "mosaic_tpu" or "xla" for `decode_attention`; a tuple of
      names in order of preference; None for the first that can run the call.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  return dispatch.choose("decode_step", implementation, query, store, blocks) == "triton"


def step_refusal(query: Array, store: CacheArrays, blocks: BlockRule) -> str | None:
  """Why the Triton kernels of a whole step cannot run a call; None if they can."""
  if reason := head_refusal(query):
    return reason
  if blocks.size > _MOST_ROWS:
    return f"a block has {blocks.size} tokens; at most {_MOST_ROWS} fit a kernel's registers"
  if 0 in store.compact_key.shape:
    return "the cache has no compact entries"
  return None


def step_attention_refusal(query: Array, store: CacheArrays, blocks: BlockRule) -> str | None:
  """Why the TPU kernel cannot run the attention of a step; None if it can."""
  del blocks
  return attention_refusal(query, store.compact_key)


def attention_refusal(query: Array, compact_key: Array, *_: Any, **options: Any) -> str | None:
  """Why the TPU kernel cannot run a call of `decode_attention`; None if it can."""
  del options
  if str(query.dtype) not in ("bfloat16", "float32"):
    return f"dtype is {query.dtype}; it must be bfloat16 or float32"
  if 0 in compact_key.shape:
    return "the cache has no compact entries"
  return None
