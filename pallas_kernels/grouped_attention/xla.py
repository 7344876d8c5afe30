"""Grouped attention in plain XLA: blocks of queries against all summaries. Runs anywhere.

One block of queries is alive at a time, so temporaries grow as block × (r + k), never L². The
backward pass recomputes each block.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.grouped_attention.kv_sources import KVSources
from pallas_kernels.grouped_attention.reference import in_range

BLOCK_Q = 256


def grouped_attention_xla(
  query: Float[Array, "B L H D"],
  sources: KVSources,
  *,
  scale: float,
  group_bias: float,
  max_window: int,
) -> Float[Array, "B L H D"]:
  """See `grouped_attention`."""
  B, L, H, D = query.shape
  N = sources.focal.key.shape[2]
  R = H // N
  block = min(BLOCK_Q, L)
  blocks = math.ceil(L / block)
  focal, group, window = sources
  slab = min(block + max_window, window.key.shape[1])

  q_TxBxNxRxbxD = _split(query.reshape(B, L, N, R, D).transpose(0, 2, 3, 1, 4), blocks, block)
  ranges_TxBxnxb = jax.tree.map(
    lambda x_BxnxL: _split(x_BxnxL[..., None], blocks, block)[..., 0],
    [(s.start, s.end) for s in sources],
  )

  # The window of a block of queries is one piece of the window list. All pieces are cut out
  # before the loop: inside, their transpose would touch the whole list once a block.
  slab_start_TxBxn = ranges_TxBxnxb[2][0][..., 0]
  slab_start_TxBxn = jnp.minimum(slab_start_TxBxn, window.key.shape[1] - slab)
  slab_key = _slabs(_heads_first(window.key), slab_start_TxBxn, slab)
  slab_value = _slabs(_heads_first(window.value), slab_start_TxBxn, slab)

  # Held in float32, so that their gradients, summed block by block, are too.
  def summaries(*x_BxSxNxD: Array) -> Float[Array, "B N S D"]:
    return _heads_first(jnp.concatenate(x_BxSxNxD, axis=1).astype(jnp.float32))

  summary_key_BxNxSxD = summaries(focal.key, group.key)
  summary_value_BxNxSxD = summaries(focal.value, group.value)
  r, k = focal.key.shape[1], group.key.shape[1]
  bias_S = jnp.concatenate([jnp.zeros(r), jnp.full(k, group_bias), jnp.zeros(slab)])

  @jax.checkpoint
  def attend(block_inputs: tuple) -> Array:
    q_BxNxRxbxD, ranges_Bxnxb, start_Bxn, key_BxNxwxD, value_BxNxwxD = block_inputs
    focal_Bxnxb, group_Bxnxb, window_Bxnxb = ranges_Bxnxb
    visible_Bxnx1xbxS = jnp.concatenate(
      [
        in_range(r, *focal_Bxnxb),
        in_range(k, *group_Bxnxb),
        in_range(slab, *(x - start_Bxn[..., None] for x in window_Bxnxb)),
      ],
      axis=-1,
    )[:, :, None]
    logits_BxNxRxbxS = jnp.concatenate(
      [
        _product("bnrqd,bnsd->bnrqs", q_BxNxRxbxD, keys.astype(query.dtype))
        for keys in (summary_key_BxNxSxD, key_BxNxwxD)
      ],
      axis=-1,
    )
    logits_BxNxRxbxS = logits_BxNxRxbxS * scale + bias_S.reshape(1, 1, 1, 1, -1)
    logits_BxNxRxbxS = jnp.where(visible_Bxnx1xbxS, logits_BxNxRxbxS, -jnp.inf)
    top = jax.lax.stop_gradient(logits_BxNxRxbxS.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits_BxNxRxbxS - jnp.where(jnp.isneginf(top), 0, top))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(query.dtype)
    out_BxNxRxbxD = _product(
      "bnrqs,bnsd->bnrqd", weights[..., : r + k], summary_value_BxNxSxD.astype(query.dtype)
    ) + _product("bnrqs,bnsd->bnrqd", weights[..., r + k :], value_BxNxwxD)
    return (out_BxNxRxbxD / jnp.where(total == 0, 1, total)).astype(query.dtype)

  out_TxBxNxRxbxD = jax.lax.map(
    attend, (q_TxBxNxRxbxD, ranges_TxBxnxb, slab_start_TxBxn, slab_key, slab_value)
  )
  out_BxTxbxNxRxD = out_TxBxNxRxbxD.transpose(1, 0, 4, 2, 3, 5)
  return out_BxTxbxNxRxD.reshape(B, blocks * block, H, D)[:, :L]


def _heads_first(x_BxSxNxD: Array) -> Array:
  return x_BxSxNxD.transpose(0, 2, 1, 3)


def _product(equation: str, a: Array, b: Array) -> Array:
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _split(x: Array, blocks: int, block: int) -> Array:
  """[..., L, D] to [blocks, ..., block, D]; the last entry is repeated to fill the last block."""
  short = blocks * block - x.shape[-2]
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, short), (0, 0)], mode="edge")
  x = x.reshape(*x.shape[:-2], blocks, block, x.shape[-1])
  return jnp.moveaxis(x, -3, 0)


def _slabs(x_BxNxwxD: Array, start_TxBxn: Array, size: int) -> Array:
  """[T, B, N, size, D]: for every block of queries its piece of the window list."""
  B, N, _, D = x_BxNxwxD.shape
  start_TxBxN = jnp.broadcast_to(start_TxBxn, (start_TxBxn.shape[0], B, N))

  def cut(x_wxD: Array, start: Array) -> Array:
    return jax.lax.dynamic_slice(x_wxD, (start, jnp.zeros_like(start)), (size, D))

  return jax.vmap(jax.vmap(jax.vmap(cut)), in_axes=(None, 0))(x_BxNxwxD, start_TxBxN)
