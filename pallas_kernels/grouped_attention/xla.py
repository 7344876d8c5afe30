"""Grouped attention in plain XLA: blocks of queries against all summaries. Runs on any device.

Summaries are [focal | groups]. Only one block of queries is alive at a time, so temporaries grow
as block × (r + k), never as L². The backward pass recomputes each block.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.grouped_attention.kv_sources import HeadOrder, KVSources
from pallas_kernels.masks import in_range
from pallas_kernels.products import einsum_float32

BLOCK_Q = 256


class _Block(NamedTuple):
  """One block of b queries and its slice of the window."""

  query: Array  # [B, N, R, b, D]
  ranges: list[tuple[Array, Array]]  # start and end [B, n, b] for each source
  window_start: Array  # [B, n] index of the slice in the window
  window_key: Array  # [B, N, w, D]
  window_value: Array


def grouped_attention_xla(
  query: Float[Array, "B L H D"],
  sources: KVSources,
  *,
  scale: float,
  group_bias: float,
  max_window: int,
  head_order: HeadOrder | None = None,
) -> Float[Array, "B L H D"]:
  """See `grouped_attention`."""
  del head_order
  B, L, H, D = query.shape
  focal, group, window = sources
  block = min(BLOCK_Q, L)
  blocks = math.ceil(L / block)
  inputs = _split_blocks(query, sources, blocks, min(block + max_window, window.key.shape[1]))

  # XLA (jax 0.11.2, CPU) crashes while it compiles gradients of empty arrays in a loop on a mesh.
  present = [source for source in (focal, group) if source.key.shape[1]]

  # float32, so that the sum of their gradients over the blocks is float32 too.
  def summaries(parts: list[Array]) -> list[Float[Array, "B N S D"]]:
    return [_heads_first(jnp.concatenate(parts, axis=1).astype(jnp.float32))] if parts else []

  summary_keys = summaries([source.key for source in present])
  summary_values = summaries([source.value for source in present])
  r, k = focal.key.shape[1], group.key.shape[1]
  slab = inputs.window_key.shape[-2]
  biases = ((r, 0.0), (k, group_bias), (slab, 0.0))
  bias_S = jnp.concatenate([jnp.full(size, bias, jnp.float32) for size, bias in biases])

  @jax.checkpoint
  def attend(x: _Block) -> Array:
    visible_Bxnx1xbxS = _visible(x, r, k)
    logits_BxNxRxbxS = jnp.concatenate(
      [
        einsum_float32("bnrqd,bnsd->bnrqs", x.query, key_BxNxSxD.astype(query.dtype))
        for key_BxNxSxD in (*summary_keys, x.window_key)
      ],
      axis=-1,
    )
    logits_BxNxRxbxS = logits_BxNxRxbxS * scale + bias_S.reshape(1, 1, 1, 1, -1)
    logits_BxNxRxbxS = jnp.where(visible_Bxnx1xbxS, logits_BxNxRxbxS, -jnp.inf)
    highest = jax.lax.stop_gradient(logits_BxNxRxbxS.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits_BxNxRxbxS - jnp.where(jnp.isneginf(highest), 0, highest))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(query.dtype)
    out_BxNxRxbxD = einsum_float32("bnrqs,bnsd->bnrqd", weights[..., r + k :], x.window_value)
    for value_BxNxSxD in summary_values:
      out_BxNxRxbxD += einsum_float32(
        "bnrqs,bnsd->bnrqd", weights[..., : r + k], value_BxNxSxD.astype(query.dtype)
      )
    return (out_BxNxRxbxD / jnp.where(total == 0, 1, total)).astype(query.dtype)

  out_TxBxNxRxbxD = jax.lax.map(attend, inputs)
  out_BxTxbxNxRxD = out_TxBxNxRxbxD.transpose(1, 0, 4, 2, 3, 5)
  return out_BxTxbxNxRxD.reshape(B, blocks * block, H, D)[:, :L]


def _split_blocks(query: Array, sources: KVSources, blocks: int, slab: int) -> _Block:
  """All blocks, stacked along a first axis T; each gets `slab` tokens of the window."""
  B, L, H, D = query.shape
  window = sources.window
  N, block = window.key.shape[2], min(BLOCK_Q, L)
  query_BxLxNxRxD = query.reshape(B, L, N, H // N, D)
  query_TxBxNxRxbxD = _split(query_BxLxNxRxD.transpose(0, 2, 3, 1, 4), blocks, block)
  ranges_TxBxnxb = jax.tree.map(
    lambda x_BxnxL: _split(x_BxnxL[..., None], blocks, block)[..., 0],
    [(source.start, source.end) for source in sources],
  )
  # The window of a block of queries is one slice of the window source. All slices are taken before
  # the loop: inside it, the transpose of a slice would touch the whole source once a block.
  start_TxBxn = ranges_TxBxnxb[2][0][..., 0]
  start_TxBxn = jnp.minimum(start_TxBxn, window.key.shape[1] - slab)
  key, value = (_slabs(_heads_first(x), start_TxBxn, slab) for x in (window.key, window.value))
  return _Block(query_TxBxNxRxbxD, ranges_TxBxnxb, start_TxBxn, key, value)


def _visible(x: _Block, r: int, k: int) -> Array:
  """[B, n, 1, b, S] bool: which tokens each query of a block sees."""
  focal_Bxnxb, group_Bxnxb, window_Bxnxb = x.ranges
  slab = x.window_key.shape[-2]
  return jnp.concatenate(
    [
      in_range(r, *focal_Bxnxb),
      in_range(k, *group_Bxnxb),
      in_range(slab, *(bound - x.window_start[..., None] for bound in window_Bxnxb)),
    ],
    axis=-1,
  )[:, :, None]


def _heads_first(x_BxSxNxD: Array) -> Array:
  return x_BxSxNxD.transpose(0, 2, 1, 3)


def _split(x: Array, blocks: int, block: int) -> Array:
  """[..., L, D] to [blocks, ..., block, D]; the last row is repeated to fill the last block."""
  short = blocks * block - x.shape[-2]
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, short), (0, 0)], mode="edge")
  x = x.reshape(*x.shape[:-2], blocks, block, x.shape[-1])
  return jnp.moveaxis(x, -3, 0)


def _slabs(x_BxNxwxD: Array, start_TxBxn: Array, size: int) -> Array:
  """[T, B, N, size, D]: the slice of the window of each block of queries."""
  B, N, _, D = x_BxNxwxD.shape
  start_TxBxN = jnp.broadcast_to(start_TxBxn, (start_TxBxn.shape[0], B, N))

  def cut(x_wxD: Array, start: Array) -> Array:
    return jax.lax.dynamic_slice(x_wxD, (start, jnp.zeros_like(start)), (size, D))

  return jax.vmap(jax.vmap(jax.vmap(cut)), in_axes=(None, 0))(x_BxNxwxD, start_TxBxN)
