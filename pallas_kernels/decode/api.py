"""The entries to decoding: attention alone, or a whole step; they pick the implementation."""

from jaxtyping import Array, Float, Int

from pallas_kernels.decode.cache_arrays import (
  BlockRule,
  CacheArrays,
  CacheLengths,
  CacheMask,
  GroupBias,
)
from pallas_kernels.decode.xla import decode_attention_xla
from pallas_kernels.dispatch import choose, triton_refusal

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
  implementation: str | None = None,
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
    implementation: "mosaic_tpu" (TPUs), "xla" (any device), or None for the first that runs on
      the device at hand.

  Raises:
    ValueError: if the implementation is unknown.
    NotImplementedError: if it is named and cannot compute this call; the message says why.
  """
  arrays = (query, compact_key, compact_value, raw_key, raw_value, layer, visible)
  refusals = {"mosaic_tpu": _mosaic_tpu_refusal(query, compact_key)}
  if choose(implementation, refusals, query, compact_key) == "xla":
    return decode_attention_xla(*arrays, scale=scale, group_bias=group_bias)
  from pallas_kernels.decode.mosaic_tpu_decode import decode_attention_mosaic_tpu

  return decode_attention_mosaic_tpu(*arrays, scale=scale, group_bias=group_bias)


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
  query: Float[Array, "B H D"], store: CacheArrays, blocks: BlockRule, implementation: str | None
) -> bool:
  """Whether `step_in_place` serves this call.

  Args:
    query: of the call, like `store` and `blocks`.
    implementation: "triton" for it, "mosaic_tpu" or "xla" for `decode_attention`, or None for
      what runs on the device at hand.

  Raises:
    ValueError: if the implementation is unknown.
    NotImplementedError: if it is named and cannot compute this call; the message says why.
  """
  refusals = {
    "triton": _triton_refusal(query, store, blocks),
    "mosaic_tpu": _mosaic_tpu_refusal(query, store.compact_key),
  }
  return choose(implementation, refusals, query, store.compact_key) == "triton"


def _triton_refusal(query: Array, store: CacheArrays, blocks: BlockRule) -> str | None:
  if reason := triton_refusal(query):
    return reason
  if blocks.size > _MOST_ROWS:
    return f"a block has {blocks.size} tokens; these kernels take {_MOST_ROWS}"
  if 0 in store.compact_key.shape:
    return "the cache has no compact entries"
  return None


def _mosaic_tpu_refusal(query: Array, compact_key: Array) -> str | None:
  if str(query.dtype) not in ("bfloat16", "float32"):
    return f"dtype is {query.dtype}; mosaic_tpu has bfloat16 and float32"
  if 0 in compact_key.shape:
    return "the cache has no compact entries"
  return None
