"""Causal dense attention with the fastest kernel of the device.

Splash attention on TPUs, cuDNN on GPUs, the kernels of `grouped_attention` for packed documents on
GPUs, and XLA.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dga_jax.attention.segments import Documents, is_traced
from dga_jax.attention.splash import splash_causal, splash_refusal
from pallas_kernels import dispatch
from pallas_kernels.grouped_attention import grouped_attention, KVSource, KVSources

DenseImplementation = Literal["splash", "cudnn", "grouped", "xla"]


def dense_attention(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  documents: Documents,
  *,
  scale: float | Float[Array, ""] | None = None,
  implementation: DenseImplementation | None = None,
) -> Float[Array, "B L H D"]:
  """Softmax attention of every query to the tokens up to itself in its own document.

  Right padding needs no mask of its own: causal queries before it do not see it. Padding outputs 0.

  Args:
    query: any float dtype, which all arrays share.
    key: N KV heads, where N divides H.
    value: as key.
    documents: the rows.
    scale: of the logits, default 1/√D.
    implementation: "splash" of JAX's Pallas kernels for TPUs, "cudnn" or "xla" of
      `jax.nn.dot_product_attention`, "grouped" for the GPU kernels of `grouped_attention`, or None
      for the first of them that can run the call. cuDNN does not support packed documents, for
      which it is replaced by "xla".

  Raises:
    NotImplementedError: splash attention or "grouped" is named and cannot run the call.
  """
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  if is_traced(scale):  # The fused kernels take a static scale.
    query, scale = (query * scale).astype(query.dtype), 1.0
  scale = float(scale)
  if implementation is None:
    implementation = _choose(query, key, documents, scale)
  if implementation == "splash":
    out_BxLxHxD = splash_causal(query, key, value, documents.index, scale=scale)
  elif implementation == "grouped":
    sources, max_window = causal_sources(key, value, documents), key.shape[1]
    names = _GROUPED_KERNELS
    return grouped_attention(
      query, sources, scale=scale, max_window=max_window, implementation=names
    )
  elif documents.rows == "packed":
    same_BxLxL = documents.index[:, :, None] == documents.index[:, None, :]
    out_BxLxHxD = xla_attention(
      query, key, value, scale=scale, mask=same_BxLxL[:, None], is_causal=True
    )
  elif implementation == "cudnn":
    out_BxLxHxD = _cudnn_causal(query, key, value, scale)
  else:
    out_BxLxHxD = xla_attention(query, key, value, scale=scale, is_causal=True)
  return jnp.where(documents.is_token[:, :, None, None], out_BxLxHxD, 0)


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
  B, _, N, D = key.shape
  no_key = jnp.zeros((B, 0, N, D), key.dtype)
  start_BxL = documents.start
  end_BxL = start_BxL if empty else start_BxL + documents.position + documents.is_token
  none_Bx1xL = jnp.zeros_like(start_BxL)[:, None]
  no_source = KVSource(no_key, no_key, none_Bx1xL, none_Bx1xL)
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
  out: Array = jax.nn.dot_product_attention(
    query, key, value, scale=scale, implementation="xla", **masks
  )
  return out.astype(dtype)


def _cudnn_causal(q: Array, k: Array, v: Array, scale: float) -> Array:
  L = q.shape[1]
  # cuDNN's gradient needs an even length. Causal queries do not see the added token.
  q, k, v = (jnp.pad(x, ((0, 0), (0, L % 2), (0, 0), (0, 0))) for x in (q, k, v))
  out: Array = jax.nn.dot_product_attention(
    q, k, v, scale=scale, is_causal=True, implementation="cudnn"
  )
  return out[:, :L]


def _choose(query: Array, key: Array, documents: Documents, scale: float) -> DenseImplementation:
  """The first implementation that can run a call; `dispatch.collect_reports` lists the reasons."""
  reasons = {
    "splash": _splash_reason(query),
    "cudnn": _cudnn_reason(query, documents),
    "grouped": _grouped_reason(query, key, documents, scale),
    "xla": None,
  }
  order: tuple[DenseImplementation, ...] = ("splash", "cudnn", "grouped", "xla")
  chosen = next(name for name in order if reasons[name] is None)
  target = dispatch.find_target(query)
  dispatch.record(dispatch.Report("dense_attention", target, reasons, chosen))
  return chosen


def _splash_reason(query: Array) -> str | None:
  """Why splash attention cannot run a call; None if it can."""
  target = dispatch.find_target(query)
  if target.platform != "tpu":
    return f"runs on a TPU, and this call is for {target}"
  return splash_refusal(query)


def _grouped_reason(query: Array, key: Array, documents: Documents, scale: float) -> str | None:
  """Why the GPU kernels of `grouped_attention` do not run a call; None if they do."""
  if documents.rows != "packed":
    return "segment_ids are not given; cuDNN is faster for one document in each row"
  sources = causal_sources(key, key, documents)
  try:
    dispatch.choose(
      "grouped_attention",
      _GROUPED_KERNELS,
      query,
      sources,
      scale=scale,
      group_bias=0.0,
      max_window=key.shape[1],
      head_order=None,
    )
  except NotImplementedError as refused:
    return str(refused)
  return None


def _cudnn_reason(query: Array, documents: Documents) -> str | None:
  """Why cuDNN cannot run a call; None if it can."""
  D = query.shape[-1]
  target = dispatch.find_target(query)
  if target.platform == "tpu":
    return f"runs on an Ampere or newer GPU, and this call is for {target}"
  # cuDNN's lowering reads the default backend, so the choice reads the same one.
  device = jax.devices()[0]
  is_cuda = "cuda" in device.client.platform_version
  if not is_cuda or float(device.compute_capability) < 8.0:
    return f"runs on an Ampere or newer GPU, and the default device is {device.device_kind}"
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return f"query is {query.dtype}; cuDNN needs bfloat16 or float16"
  if D % 8 or D > 128:
    return f"head_dim is {D}; cuDNN needs a multiple of 8, at most 128"
  if documents.rows == "packed":
    return "segment_ids are given; cuDNN's attention has no packed documents"
  return None
