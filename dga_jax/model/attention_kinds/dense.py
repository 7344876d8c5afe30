"""Dense causal attention."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention.segments import Documents
from dga_jax.model.attention_kinds.dense_cache import DenseCache, DenseCacheAttention
from dga_jax.model.attention_kinds.splash import splash_causal, splash_refusal
from pallas_kernels.dispatch import find_target

Implementation = Literal["xla", "cudnn", "splash"]


@dataclasses.dataclass(frozen=True)
class DenseAttention(DenseCacheAttention):
  """Softmax attention over all earlier tokens.

  Attributes:
    implementation: for whole sequences: "xla" or "cudnn" of jax.nn.dot_product_attention,
      "splash" of JAX's Pallas kernels for TPUs, or None for a fused one where it applies. cuDNN
      does not support packed documents, for which it is replaced by "xla".
  """

  name = "dense"

  implementation: Implementation | None = None

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: Documents,
  ) -> Float[Array, "B L H D"]:
    """Causal attention inside each document; padding outputs 0.

    Right padding needs no mask of its own: causal queries before it do not see it.
    """
    implementation = self.implementation or _default_implementation(q_BxLxHxD)
    document_BxL = metadata.index
    if implementation == "splash":
      o_BxLxHxD = splash_causal(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, document_BxL)
    elif metadata.rows == "packed":
      same_BxLxL = document_BxL[:, :, None] == document_BxL[:, None, :]
      o_BxLxHxD = _xla(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, mask=same_BxLxL[:, None], is_causal=True)
    elif implementation == "cudnn":
      o_BxLxHxD = _cudnn_causal(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD)
    else:
      o_BxLxHxD = _xla(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, is_causal=True)
    return jnp.where(metadata.is_token[:, :, None, None], o_BxLxHxD, 0)

  def extend(
    self,
    q_BxTxHxD: Float[Array, "B T H D"],
    k_BxTxNxD: Float[Array, "B T N D"],
    v_BxTxNxD: Float[Array, "B T N D"],
    cache: DenseCache,
    layer: Int[Array, ""],
    *,
    lengths: Int[Array, "B"],
  ) -> tuple[Float[Array, "B T H D"], DenseCache]:
    """Appends several tokens; each attends to all tokens up to itself."""
    B, T = q_BxTxHxD.shape[:2]
    M, new_T = cache.key.shape[-2], jnp.arange(T)
    position_BxT = cache.length[layer][:, None] + new_T[None]
    # A slot beyond the array's end is not written.
    slot_BxT = jnp.where(new_T[None] < lengths[:, None], position_BxT, M)
    row_Bx1 = jnp.arange(B)[:, None]
    cache = DenseCache(
      key=cache.key.at[layer, row_Bx1, :, slot_BxT].set(k_BxTxNxD, mode="drop"),
      value=cache.value.at[layer, row_Bx1, :, slot_BxT].set(v_BxTxNxD, mode="drop"),
      length=cache.length.at[layer].add(lengths),
    )
    seen_BxTxM = jnp.arange(M)[None, None] <= position_BxT[..., None]
    k_BxMxNxD, v_BxMxNxD = (x[layer].swapaxes(1, 2) for x in (cache.key, cache.value))
    return _xla(q_BxTxHxD, k_BxMxNxD, v_BxMxNxD, mask=seen_BxTxM[:, None]), cache


def _xla(q: Array, k: Array, v: Array, **masks: Any) -> Array:
  dtype = q.dtype
  if dtype == jnp.float16 and jax.devices()[0].platform != "gpu":
    # The op needs a float16 product with float32 sums, which XLA supports on GPUs alone.
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  return jax.nn.dot_product_attention(q, k, v, implementation="xla", **masks).astype(dtype)


def _cudnn_causal(q: Array, k: Array, v: Array) -> Array:
  L = q.shape[1]
  # cuDNN's gradient needs an even length. Causal queries do not see the added token.
  q, k, v = (jnp.pad(x, ((0, 0), (0, L % 2), (0, 0), (0, 0))) for x in (q, k, v))
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")[:, :L]


def _default_implementation(q_BxLxHxD: Array) -> Implementation:
  """The fused kernel of the device, else "xla".

  "splash" on TPUs, and "cudnn" for 16-bit inputs on NVIDIA GPUs from Ampere on.
  """
  if find_target(q_BxLxHxD).platform == "tpu":
    return "xla" if splash_refusal(q_BxLxHxD) else "splash"
  # cuDNN's lowering reads the default backend, so the choice reads the same one.
  device = jax.devices()[0]
  D = q_BxLxHxD.shape[-1]
  if q_BxLxHxD.dtype not in (jnp.bfloat16, jnp.float16) or D % 8 or D > 128:
    return "xla"
  if "cuda" not in device.client.platform_version or float(device.compute_capability) < 8.0:
    return "xla"
  return "cudnn"
