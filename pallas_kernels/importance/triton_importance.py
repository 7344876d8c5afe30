"""Importance of keys through Pallas-Triton: two passes over the keys, no logits in memory.

The first pass computes the logsumexp of each sampled query, the second the column sums of the
softmax. JAX will remove this lowering; all code that depends on it is in files named triton_*.
"""

import math

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.dispatch import refuse
from pallas_kernels.importance.triton_logsumexp import triton_logsumexp
from pallas_kernels.importance.triton_scores import triton_scores
from pallas_kernels.importance.triton_tiles import importance_tile, ImportanceTile, make_rows
from pallas_kernels.kernel_common import LOG2_E
from pallas_kernels.masks import in_range


def sampled_importance_triton(
  query_BxSxHxD: Float[Array, "B S H D"],
  key_BxLxNxD: Float[Array, "B L N D"],
  start_BxS: Int[Array, "B S"],
  end_BxS: Int[Array, "B S"],
  *,
  tile: ImportanceTile | None = None,
  interpret: bool = False,
) -> Float[Array, "B N L"]:
  """See `sampled_importance`. `tile` overrides the sizes, `interpret` runs on a CPU.

  Raises:
    NotImplementedError: for the reasons of `refusal`.
  """
  refuse(refusal(query_BxSxHxD, key_BxLxNxD, start_BxS, end_BxS))
  S, H, D = query_BxSxHxD.shape[1:]
  L, N = key_BxLxNxD.shape[1:3]
  heads_per_kv = H // N
  tile = tile or importance_tile(S * heads_per_kv, L, D, key_BxLxNxD.dtype.itemsize)
  rows = make_rows(query_BxSxHxD, start_BxS, end_BxS, N, tile.block_q)
  scale2 = LOG2_E / math.sqrt(D)
  lse2_BxNxCxQ = triton_logsumexp(
    rows, key_BxLxNxD, scale2, heads_per_kv, tile, interpret=interpret
  )
  sum_BxNxL = triton_scores(
    rows, lse2_BxNxCxQ, key_BxLxNxD, scale2, heads_per_kv, tile, interpret=interpret
  )
  count_BxL = jnp.maximum(1, in_range(L, start_BxS, end_BxS).sum(axis=1))
  return sum_BxNxL / count_BxL[:, None].astype(jnp.float32)


def refusal(query: Array, key: Array, start: Array, end: Array) -> str | None:
  """Why these kernels cannot run a call of `sampled_importance`; None if they can."""
  del query, start, end
  if key.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
    return f"dtype is {key.dtype}; it must be float16, bfloat16 or float32"
  return None
