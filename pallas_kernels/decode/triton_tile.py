"""What the decode kernels share: rows of a cache in and out, and the running softmax."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode.quantise import pack_rows
from pallas_kernels.triton_common import dot

MASK_VALUE = -1e30  # finite, so that what sees nothing has weights exp(−inf − MASK_VALUE) = 0


class Softmax(NamedTuple):
  """Weighted sum [M, D], largest logit [M] and sum of weights [M] of what was seen so far."""

  sum: Array
  top: Array
  total: Array


def add_tile(seen: Softmax, logits_MxT: Array, value_TxD: Array, weight_T: Array | None) -> Softmax:
  """One step of the running softmax; `weight_T` scales the values."""
  top_M = jnp.maximum(seen.top, logits_MxT.max(axis=1))
  weights_MxT = jnp.exp(logits_MxT - top_M[:, None])
  fade_M = jnp.exp(seen.top - top_M)
  total_M = seen.total * fade_M + weights_MxT.sum(axis=1)
  if weight_T is not None:
    weights_MxT *= weight_T[None]
  sum_MxD = seen.sum * fade_M[:, None] + dot(weights_MxT.astype(value_TxD.dtype), value_TxD)
  return Softmax(sum_MxD, top_M, total_M)


def load_rows(
  ref: Any, at: tuple[Any, ...], first: Array | int, rows: int, end: Array | int
) -> Array:
  """[rows, D] of a reference [..., entries, D] from `first` on; zeros from `end` on."""
  keep = (first + jnp.arange(rows) < end)[:, None]
  part = ref.at[(*at, pl.ds(first, rows), slice(None))]
  zero = 0 if jnp.issubdtype(ref.dtype, jnp.integer) else 0.0
  return plgpu.load(part, mask=jnp.broadcast_to(keep, part.shape), other=zero)


def store_rows(
  ref: Any, scales_ref: Any, layer: Array, at_S: Array, rows_SxD: Array, mask_S: Array
) -> None:
  """Stores rows at entries of one layer, quantised where the reference has scales."""
  shape, entries = rows_SxD.shape, ref.shape[1]
  at_S = jnp.where(mask_S, at_S, entries)
  mask_S = at_S < entries
  index_SxD = jnp.broadcast_to(at_S[:, None], shape)
  mask_SxD = jnp.broadcast_to(mask_S[:, None], shape)
  rows_SxD, scale_S = pack_rows(rows_SxD, ref.dtype)
  if scale_S is not None:
    plgpu.store(scales_ref.at[jnp.broadcast_to(layer, at_S.shape), at_S], scale_S, mask=mask_S)
  column_SxD = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
  layer_SxD = jnp.broadcast_to(layer, shape)
  plgpu.store(ref.at[layer_SxD, index_SxD, column_SxD], rows_SxD, mask=mask_SxD)
