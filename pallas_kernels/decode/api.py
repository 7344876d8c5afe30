"""The two decoding ops, attention over a cache and a whole step in place, and their dispatch."""

from jaxtyping import Array, Float, Int

from pallas_kernels.decode.cache_arrays import BlockRule, CacheArrays, CacheLengths, GroupBias
from pallas_kernels.decode.cache_layout import CacheMask
from pallas_kernels.decode.xla import decode_attention_xla
from pallas_kernels.dispatch import choose, triton_refusal

_MOST_ROWS = 128  # of a block: more do not fit a kernel's registers


def decode_attention(
  query: Float[Array, "B H D"],
  cache: CacheArrays,
  layer: Int[Array, ""] | int,
  mask: CacheMask,
  *,
  scale: float,
  group_bias: GroupBias | None = None,
  implementation: str | None = None,
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
    implementation: "mosaic_tpu" (TPUs), "xla" (any device), or None for the first that runs on
      the device of the arrays.

  Returns:
    [B, H, D] in the dtype of the query.

  Raises:
    ValueError: if the implementation is unknown, or the cache is in 8 bits.
    NotImplementedError: if the named implementation cannot compute this call; the message says
      why.
  """
  if cache.key_scale is not None:
    raise ValueError(
      f"cache.compact_key is {cache.compact_key.dtype} with scales; decode_attention wants entries"
      " in the query's dtype: pass cache.unpack(layer), with layer=0."
    )
  refusals = {"mosaic_tpu": _mosaic_tpu_refusal(query, cache)}
  if choose(implementation, refusals, query, cache.compact_key) == "xla":
    return decode_attention_xla(query, cache, layer, mask, scale=scale, group_bias=group_bias)
  from pallas_kernels.decode.mosaic_tpu_decode import decode_attention_mosaic_tpu

  return decode_attention_mosaic_tpu(query, cache, layer, mask, scale=scale, group_bias=group_bias)


def step_in_place(
  query: Float[Array, "B H D"],
  key: Float[Array, "B N D"],
  value: Float[Array, "B N D"],
  cache: CacheArrays,
  lengths: CacheLengths,
  layer: Int[Array, ""] | int,
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
    rule: the layout of the cache, and how a complete block becomes compact entries.
    scale: of the attention logits.
    group_bias: added to the logits of groups.

  Returns:
    The output of attention, the cache, and the new lengths.
  """
  from pallas_kernels.decode.triton_step import step_triton

  return step_triton(
    query, key, value, cache, lengths, layer, rule=rule, scale=scale, group_bias=group_bias
  )


def has_step_kernel(
  query: Float[Array, "B H D"], cache: CacheArrays, rule: BlockRule, implementation: str | None
) -> bool:
  """Whether `step_in_place` can compute this call.

  Args:
    query: of the call, as `cache` and `rule` are.
    implementation: "triton" for `step_in_place`, "mosaic_tpu" or "xla" for `decode_attention`, or
      None for the first that runs on the device of the arrays.

  Raises:
    ValueError: if the implementation is unknown.
    NotImplementedError: if the named implementation cannot compute this call; the message says
      why.
  """
  refusals = {
    "triton": _triton_refusal(query, cache, rule),
    "mosaic_tpu": _mosaic_tpu_refusal(query, cache),
  }
  return choose(implementation, refusals, query, cache.compact_key) == "triton"


def _triton_refusal(query: Array, cache: CacheArrays, rule: BlockRule) -> str | None:
  if reason := triton_refusal(query):
    return reason
  if rule.layout.block_size > _MOST_ROWS:
    return f"a block has {rule.layout.block_size} tokens; these kernels take {_MOST_ROWS}"
  if 0 in cache.compact_key.shape:
    return "the cache has no compact entries"
  return None


def _mosaic_tpu_refusal(query: Array, cache: CacheArrays) -> str | None:
  if str(query.dtype) not in ("bfloat16", "float32"):
    return f"dtype is {query.dtype}; mosaic_tpu has bfloat16 and float32"
  if 0 in cache.compact_key.shape:
    return "the cache has no compact entries"
  return None
