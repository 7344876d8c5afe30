"""Dense causal attention on TPUs with splash attention, a Pallas kernel of JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LANES, _SMALL_BLOCK, _LARGE_BLOCK = 128, 512, 1024


def splash_refusal(q_BxLxHxD: Array) -> str | None:
  """Why the kernel cannot compute attention of such queries; None if it can."""
  if q_BxLxHxD.dtype not in (jnp.bfloat16, jnp.float32):
    return f"query is {q_BxLxHxD.dtype}; splash attention needs bfloat16 or float32"
  return None


def padded_length(length: int) -> tuple[int, int]:
  """The length to which a sequence is padded, and the length of a tile.

  By static schedules, counted as in benchmarks/tpu_static.py, tiles of 512 need half as many
  bundles for a pair of tokens as tiles of 256, which saves more than the padding costs. A shorter
  sequence is one tile.
  """
  if length <= _SMALL_BLOCK:
    block = -(-length // _LANES) * _LANES
    return block, block
  padded = -(-length // _SMALL_BLOCK) * _SMALL_BLOCK
  return padded, _SMALL_BLOCK if padded % _LARGE_BLOCK else _LARGE_BLOCK


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

  Sequences are padded at their end to whole tiles. Causal queries do not see the padding.

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
  P, block = padded_length(L)
  sizes = BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  mask = MultiHeadMask([CausalMask((P, P))] * H)
  attend = make_splash_mha_single_device(mask=mask, block_sizes=sizes, interpret=interpret)

  def of_row(q: Array, k: Array, v: Array, documents_P: Array) -> Array:
    return attend(q, k, v, segment_ids=SegmentIds(documents_P, documents_P))

  def padded(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (0, P - L), *[(0, 0)] * (x.ndim - 2)))

  scaled_BxLxHxD = q_BxLxHxD * jnp.asarray(D**-0.5 if scale is None else scale, q_BxLxHxD.dtype)
  q, k, v = (padded(x).swapaxes(1, 2) for x in (scaled_BxLxHxD, k_BxLxNxD, v_BxLxNxD))
  return jax.vmap(of_row)(q, k, v, padded(documents_BxL)).swapaxes(1, 2)[:, :L]
