"""Causal dense attention with the fastest kernel of the device.

Splash attention on TPUs, cuDNN on GPUs, and the kernels of `grouped_attention` on GPUs where cuDNN
cannot run a call. XLA, which computes the logits of all pairs of tokens, is for the other calls.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dga_jax.attention.attend import zero_padding
from dga_jax.attention.segments import Documents, is_traced
from dga_jax.attention.splash import splash_causal, splash_refusal
from pallas_kernels import dispatch
from pallas_kernels.dispatch import Backend, Implementation
from pallas_kernels.grouped_attention import grouped_attention, KVSource, KVSources


def dense_attention(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  documents: Documents,
  *,
  scale: float | Float[Array, ""] | None = None,
  implementation: Implementation = None,
) -> Float[Array, "B L H D"]:
  """Softmax attention of every query to the tokens up to itself in its own document.

  Right padding needs no mask of its own: causal queries before it do not see it. Padding outputs 0.

  Args:
    query: any float dtype, which all arrays share.
    key: N KV heads, where N divides H.
    value: as key.
    documents: the rows.
    scale: of the logits, default 1/√D.
    implementation: "splash" for JAX's Pallas kernels for TPUs, "cudnn" or "xla" for
      `jax.nn.dot_product_attention`, "grouped" for the GPU kernels of `grouped_attention` with a
      window that begins at the document; a tuple of names in order of preference; None for the
      first of them that can run the call.

  Raises:
    ValueError: a name is unknown.
    NotImplementedError: no named implementation can run the call; the message says why not.
  """
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  if is_traced(scale):  # The fused kernels take a static scale.
    query, scale = (query * scale).astype(query.dtype), 1.0
  out_BxLxHxD: Array = dispatch.run(
    "dense_attention", implementation, query, key, value, documents, scale=float(scale)
  )
  return out_BxLxHxD


# Backends of `grouped_attention` whose work follows the ranges of keys.
_GROUPED_KERNELS = ("mosaic_gpu", "triton")


def causal_sources(
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  documents: Documents,
  *,
  empty: bool = False,
) -> KVSources:
  """The sources of `grouped_attention` for causal attention inside each document.

  The window of a query begins at its document. Padding sees nothing.

  Args:
    key: of the tokens.
    value: of the tokens.
    documents: the rows.
    empty: whether all windows are empty.
  """
  start_BxL = documents.start
  end_BxL = start_BxL
  if not empty:
    end_BxL = start_BxL + documents.position + documents.is_token.astype(jnp.int32)
  none_Bx1xL = jnp.zeros_like(start_BxL)[:, None]
  no_source = KVSource(key[:, :0], value[:, :0], none_Bx1xL, none_Bx1xL)
  window = KVSource(key, value, start_BxL[:, None], end_BxL[:, None])
  return KVSources(no_source, no_source, window)


def xla_attention(
  query: Float[Array, "B T H D"],
  key: Float[Array, "B S N D"],
  value: Float[Array, "B S N D"],
  *,
  scale: float | None = None,
  **masks: Any,
) -> Float[Array, "B T H D"]:
  """`jax.nn.dot_product_attention` in XLA, in the query's dtype on every device.

  Args:
    query: any float dtype, which all arrays share.
    key: N KV heads, where N divides H.
    value: as key.
    scale: of the logits, default 1/√D.
    masks: `mask` and `is_causal` of `jax.nn.dot_product_attention`.
  """
  dtype = query.dtype
  if dtype == jnp.float16 and jax.devices()[0].platform != "gpu":
    # The op needs a float16 product with float32 sums, which XLA supports on GPUs alone.
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
  with jax.numpy_dtype_promotion("standard"):  # JAX's function itself needs it for 16 bits.
    out: Array = jax.nn.dot_product_attention(
      query, key, value, scale=scale, implementation="xla", **masks
    )
  return out.astype(dtype)


def _splash(q: Array, k: Array, v: Array, documents: Documents, *, scale: float) -> Array:
  return zero_padding(documents, splash_causal(q, k, v, documents.index, scale=scale))[0]


def _splash_refusal(query: Array, *_: Any, **options: Any) -> str | None:
  del options
  return splash_refusal(query)


def _cudnn(q: Array, k: Array, v: Array, documents: Documents, *, scale: float) -> Array:
  L = q.shape[1]
  # cuDNN's gradient needs an even length. Causal queries do not see the added token.
  q, k, v = (jnp.pad(x, ((0, 0), (0, L % 2), (0, 0), (0, 0))) for x in (q, k, v))
  out: Array = jax.nn.dot_product_attention(
    q, k, v, scale=scale, is_causal=True, implementation="cudnn"
  )
  return zero_padding(documents, out[:, :L])[0]


def _cudnn_refusal(q: Array, k: Array, v: Array, documents: Documents, **_: Any) -> str | None:
  del k, v
  D = q.shape[-1]
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"query is {q.dtype}; cuDNN needs bfloat16 or float16"
  if D % 8 or D > 128:
    return f"head_dim is {D}; cuDNN needs a multiple of 8, at most 128"
  if documents.rows == "packed":
    return "segment_ids are given; cuDNN's attention has no packed documents"
  return None


def _cudnn_host_refusal() -> str | None:
  """JAX lowers cuDNN's attention for the first device of the default backend alone."""
  device = jax.devices()[0]
  is_cuda = "cuda" in device.client.platform_version
  if not is_cuda or float(device.compute_capability) < 8.0:
    return f"runs on an Ampere or newer GPU, and the default device is {device.device_kind}"
  return None


def _grouped(q: Array, k: Array, v: Array, documents: Documents, *, scale: float) -> Array:
  return grouped_attention(
    q,
    causal_sources(k, v, documents),
    scale=scale,
    max_window=k.shape[1],
    implementation=_GROUPED_KERNELS,
  )


def _grouped_refusal(
  q: Array, k: Array, v: Array, documents: Documents, *, scale: float
) -> str | None:
  if q.dtype == jnp.float32 and documents.rows != "packed":
    return (
      "query is float32, whose products these kernels compute without tensor cores; XLA computes "
      "rows of one document"
    )
  sources = jax.eval_shape(causal_sources, k, v, documents)
  options = {"scale": scale, "group_bias": 0.0, "max_window": k.shape[1], "head_order": None}
  return dispatch.refusal("grouped_attention", _GROUPED_KERNELS, q, sources, **options)


def _xla(q: Array, k: Array, v: Array, documents: Documents, *, scale: float) -> Array:
  mask = None
  if documents.rows == "packed":
    mask = (documents.index[:, :, None] == documents.index[:, None, :])[:, None]
  out = xla_attention(q, k, v, scale=scale, mask=mask, is_causal=True)
  return zero_padding(documents, out)[0]


dispatch.define(
  "dense_attention",
  Backend("splash", dispatch.TPU, _splash, _splash_refusal),
  Backend("cudnn", dispatch.AMPERE, _cudnn, _cudnn_refusal, host_refusal=_cudnn_host_refusal),
  Backend("grouped", dispatch.AMPERE, _grouped, _grouped_refusal),
  Backend("xla", dispatch.ANY, _xla),
)
