"""Dense causal attention on TPUs with splash attention, a Pallas kernel of JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCKS = (1024, 512, 256, 128)


def splash_refusal(q_BxLxHxD: Array) -> str | None:
  """Why the kernel cannot compute attention of such queries; None if it can."""
  _, L, _, D = q_BxLxHxD.shape
  if D % 128:
    return f"head_dim is {D}; splash attention needs a multiple of 128"
  if L % _BLOCKS[-1]:
    return f"the sequence has {L} tokens; splash attention needs a multiple of {_BLOCKS[-1]}"
  return None


def splash_causal(
  q_BxLxHxD: Float[Array, "B L H D"],
  k_BxLxNxD: Float[Array, "B L N D"],
  v_BxLxNxD: Float[Array, "B L N D"],
  documents_BxL: Int[Array, "B L"],
  *,
  scale: float | Float[Array, ""] | None = None,
  interpret: bool = False,
) -> Float[Array, "B L H D"]:
  """Causal attention inside each document.

  Args:
    q_BxLxHxD: queries.
    k_BxLxNxD: keys.
    v_BxLxNxD: values.
    documents_BxL: a number for the document of each token; a query sees keys of its own document.
    scale: of the logits, default 1/√D.
    interpret: runs the kernel in Pallas's interpreter, on any device.

  Raises:
    NotImplementedError: the kernel cannot compute the call; see `splash_refusal`.
  """
  # Imported lazily: the import loads Pallas's TPU compiler.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    make_splash_mha_single_device,
    MultiHeadMask,
    SegmentIds,
  )

  if refusal := splash_refusal(q_BxLxHxD):
    raise NotImplementedError(refusal)
  _, L, H, D = q_BxLxHxD.shape
  block = next(size for size in _BLOCKS if L % size == 0)
  sizes = BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  mask = MultiHeadMask([CausalMask((L, L))] * H)
  attend = make_splash_mha_single_device(mask=mask, block_sizes=sizes, interpret=interpret)

  def of_row(q: Array, k: Array, v: Array, documents_L: Array) -> Array:
    return attend(q, k, v, segment_ids=SegmentIds(documents_L, documents_L))

  scaled_BxLxHxD = q_BxLxHxD * jnp.asarray(D**-0.5 if scale is None else scale, q_BxLxHxD.dtype)
  q, k, v = (x.swapaxes(1, 2) for x in (scaled_BxLxHxD, k_BxLxNxD, v_BxLxNxD))
  return jax.vmap(of_row)(q, k, v, documents_BxL).swapaxes(1, 2)
