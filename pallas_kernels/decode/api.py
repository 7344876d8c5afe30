"""The one entry to decode attention: picks the implementation for the device."""

from jaxtyping import Array, Float, Int

from pallas_kernels.decode.entries import GroupBias, Visible
from pallas_kernels.decode.xla import decode_attention_xla
from pallas_kernels.target import choose


def decode_attention(
  query: Float[Array, "B H D"],
  compact_key: Float[Array, "layers B N C D"],
  compact_value: Float[Array, "layers B N C D"],
  raw_key: Float[Array, "layers B N W D"],
  raw_value: Float[Array, "layers B N W D"],
  layer: Int[Array, ""] | int,
  visible: Visible,
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


def _mosaic_tpu_refusal(query: Array, compact_key: Array) -> str | None:
  if str(query.dtype) not in ("bfloat16", "float32"):
    return f"dtype is {query.dtype}; mosaic_tpu has bfloat16 and float32"
  if 0 in compact_key.shape:
    return "the cache has no compact entries"
  return None
