"""Dense causal attention and its cache of every key and value."""

import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from dga_jax.attention.segments import find_documents
from dga_jax.model.attention_kinds.splash import splash_causal, splash_refusal
from pallas_kernels.dispatch import find_target

Implementation = Literal["xla", "cudnn", "splash"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
  """Keys and values; in decoding every array has a leading axis of layers.

  Heads come before positions, so that the products of decoding read contiguous memory.

  Attributes:
    key: keys after RoPE; entries from `length` on are not read.
    value: values.
    length: tokens that each sequence has seen.
  """

  key: Float[Array, "*layers B N M D"]
  value: Float[Array, "*layers B N M D"]
  length: Int[Array, "*layers B"]

  @classmethod
  def of_prompt(
    cls,
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    *,
    lengths: Int[Array, "B"] | None,
    max_length: int,
  ) -> Self:
    """One layer's cache after a right-padded prompt; padding is overwritten by decoding."""
    B, L = k_BxLxNxD.shape[:2]
    free = ((0, 0), (0, 0), (0, max_length - L), (0, 0))
    return cls(
      key=jnp.pad(k_BxLxNxD.swapaxes(1, 2), free),
      value=jnp.pad(v_BxLxNxD.swapaxes(1, 2), free),
      length=jnp.full(B, L, jnp.int32) if lengths is None else lengths.astype(jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class DenseAttention:
  """Softmax attention over all earlier tokens.

  Attributes:
    implementation: over whole sequences: "xla" and "cudnn" of jax.nn.dot_product_attention,
      "splash" of JAX's Pallas kernels for TPUs, or None for the fused ones where they apply. cuDNN
      knows no packed documents, which take "xla" then.
  """

  implementation: Implementation | None = None

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    *,
    segment_ids: Int[Array, "B L"] | None,
    lengths: Int[Array, "B"] | None,
  ) -> Float[Array, "B L H D"]:
    """Causal attention inside each document; padded queries give 0.

    Right padding needs no mask of its own: causal queries before it do not see it.
    """
    B, L = q_BxLxHxD.shape[:2]
    documents = find_documents(B, L, lengths, segment_ids)
    implementation = self.implementation or _default_implementation(q_BxLxHxD)
    if implementation == "splash":
      o_BxLxHxD = splash_causal(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, documents.index)
    elif segment_ids is not None:
      same_BxLxL = documents.index[:, :, None] == documents.index[:, None, :]
      o_BxLxHxD = _xla(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, mask=same_BxLxL[:, None], is_causal=True)
    elif implementation == "cudnn":
      o_BxLxHxD = _cudnn_causal(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD)
    else:
      o_BxLxHxD = _xla(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, is_causal=True)
    return jnp.where(documents.is_token[:, :, None, None], o_BxLxHxD, 0)

  def init_cache(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> DenseCache:
    """An empty cache of one layer for `max_length` tokens a sequence."""
    shape = (batch, num_kv_heads, max_length, head_dim)
    return DenseCache(
      key=jnp.zeros(shape, dtype),
      value=jnp.zeros(shape, dtype),
      length=jnp.zeros(batch, jnp.int32),
    )

  def prefill(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    *,
    lengths: Int[Array, "B"] | None,
    max_length: int,
  ) -> tuple[Float[Array, "B L H D"], DenseCache]:
    """Attends over a right-padded prompt and stores it."""
    o_BxLxHxD = self.attend(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, segment_ids=None, lengths=lengths)
    cache = DenseCache.of_prompt(k_BxLxNxD, v_BxLxNxD, lengths=lengths, max_length=max_length)
    return o_BxLxHxD, cache

  def decode(
    self,
    q_BxHxD: Float[Array, "B H D"],
    k_BxNxD: Float[Array, "B N D"],
    v_BxNxD: Float[Array, "B N D"],
    cache: DenseCache,
    layer: Int[Array, ""],
  ) -> tuple[Float[Array, "B H D"], DenseCache]:
    """Appends one token at each sequence's own end and attends to all tokens so far.

    A token beyond the cache's max_length is not stored and raises nothing, since lengths are
    unknown under jit: whoever decodes bounds the number of steps.
    """
    (B, H, D), N = q_BxHxD.shape, k_BxNxD.shape[1]
    row_B, end_B = jnp.arange(B), cache.length[layer]
    cache = DenseCache(
      key=cache.key.at[layer, row_B, :, end_B].set(k_BxNxD, mode="drop"),
      value=cache.value.at[layer, row_B, :, end_B].set(v_BxNxD, mode="drop"),
      length=cache.length.at[layer].add(1),
    )
    k_BxNxMxD, v_BxNxMxD = cache.key[layer], cache.value[layer]
    q_BxNxRxD = q_BxHxD.reshape(B, N, H // N, D)
    s_BxNxRxM = D**-0.5 * jnp.einsum(
      "BNRD,BNMD->BNRM", q_BxNxRxD, k_BxNxMxD, preferred_element_type=jnp.float32
    )
    is_token_BxM = jnp.arange(k_BxNxMxD.shape[2])[None, :] <= end_B[:, None]
    w_BxNxRxM = jax.nn.softmax(jnp.where(is_token_BxM[:, None, None], s_BxNxRxM, -jnp.inf))
    o_BxNxRxD = jnp.einsum("BNRM,BNMD->BNRD", w_BxNxRxM.astype(v_BxNxMxD.dtype), v_BxNxMxD)
    return o_BxNxRxD.reshape(B, H, D), cache

  def extend(
    self,
    q_BxTxHxD: Float[Array, "B T H D"],
    k_BxTxNxD: Float[Array, "B T N D"],
    v_BxTxNxD: Float[Array, "B T N D"],
    cache: DenseCache,
    layer: Int[Array, ""],
    *,
    counts: Int[Array, "B"],
  ) -> tuple[Float[Array, "B T H D"], DenseCache]:
    """Appends several tokens and attends to all up to each."""
    B, T = q_BxTxHxD.shape[:2]
    M, place_T = cache.key.shape[-2], jnp.arange(T)
    position_BxT = cache.length[layer][:, None] + place_T[None]
    slot_BxT = jnp.where(place_T[None] < counts[:, None], position_BxT, M)
    row_Bx1 = jnp.arange(B)[:, None]
    cache = DenseCache(
      key=cache.key.at[layer, row_Bx1, :, slot_BxT].set(k_BxTxNxD, mode="drop"),
      value=cache.value.at[layer, row_Bx1, :, slot_BxT].set(v_BxTxNxD, mode="drop"),
      length=cache.length.at[layer].add(counts),
    )
    seen_BxTxM = jnp.arange(M)[None, None] <= position_BxT[..., None]
    k_BxMxNxD, v_BxMxNxD = (x[layer].swapaxes(1, 2) for x in (cache.key, cache.value))
    return _xla(q_BxTxHxD, k_BxMxNxD, v_BxMxNxD, mask=seen_BxTxM[:, None]), cache


def _xla(q: Array, k: Array, v: Array, **masks: Any) -> Array:
  dtype = q.dtype
  if dtype == jnp.float16 and jax.devices()[0].platform != "gpu":
    # The op asks for a float16 product with float32 sums, which XLA has for GPUs alone.
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  return jax.nn.dot_product_attention(q, k, v, implementation="xla", **masks).astype(dtype)


def _cudnn_causal(q: Array, k: Array, v: Array) -> Array:
  L = q.shape[1]
  # Its gradient wants an even length. Causal queries do not see the token that is added.
  q, k, v = (jnp.pad(x, ((0, 0), (0, L % 2), (0, 0), (0, 0))) for x in (q, k, v))
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")[:, :L]


def _default_implementation(q_BxLxHxD: Array) -> Implementation:
  """Splash on TPUs, cuDNN's for 16-bit inputs on CUDA devices from Ampere on, else XLA."""
  if find_target(q_BxLxHxD).platform == "tpu":
    return "xla" if splash_refusal(q_BxLxHxD) else "splash"
  # cuDNN's lowering asks the default backend as well, so nothing finer could decide here.
  device = jax.devices()[0]
  D = q_BxLxHxD.shape[-1]
  if q_BxLxHxD.dtype not in (jnp.bfloat16, jnp.float16) or D % 8 or D > 128:
    return "xla"
  if "cuda" not in device.client.platform_version or float(device.compute_capability) < 8.0:
    return "xla"
  return "cudnn"
