"""What the Triton decode kernels share: loads and stores of cache rows, and the running softmax."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode.quantise import pack_rows
from pallas_kernels.kernel_common import MASK_VALUE
from pallas_kernels.triton_common import dot, padded_slice

MIN_DOT_SIDE = 16  # rows and columns of a matrix product are padded to at least this many


class OnlineSoftmax(NamedTuple):
  """The softmax over the entries so far: weighted sum, largest logit and sum of the weights."""

  acc: Array  # [M, D]
  m: Array  # [M]
  l: Array  # [M]  # noqa: E741


def empty_softmax(rows: int, head_dim: int) -> OnlineSoftmax:
  """The softmax over no entries."""
  return OnlineSoftmax(
    acc=jnp.zeros((rows, head_dim), jnp.float32),
    m=jnp.full((rows,), MASK_VALUE),
    l=jnp.zeros((rows,), jnp.float32),
  )


def add_tile(
  softmax: OnlineSoftmax, logits_MxT: Array, value_TxD: Array, value_scale_T: Array | None
) -> OnlineSoftmax:
  """One step of the running softmax; value t is `value_scale_T[t]` times its row."""
  m_M = jnp.maximum(softmax.m, logits_MxT.max(axis=1))
  weights_MxT = jnp.exp(logits_MxT - m_M[:, None])
  alpha_M = jnp.exp(softmax.m - m_M)
  l_M = softmax.l * alpha_M + weights_MxT.sum(axis=1)
  if value_scale_T is not None:
    weights_MxT *= value_scale_T[None]
  weighted_MxD = dot(weights_MxT.astype(value_TxD.dtype), value_TxD)
  return OnlineSoftmax(softmax.acc * alpha_M[:, None] + weighted_MxD, m_M, l_M)


def load_rows(
  ref: Any, at: tuple[Any, ...], first: Array | int, rows: int, end: Array | int
) -> Array:
  """Rows [first, first + rows) of a reference [..., entries, D]; zeros from row `end` on."""
  keep = (first + jnp.arange(rows) < end)[:, None]
  part = ref.at[(*at, padded_slice(first, rows), slice(None))]
  zero = 0 if jnp.issubdtype(ref.dtype, jnp.integer) else 0.0
  return plgpu.load(part, mask=jnp.broadcast_to(keep, part.shape), other=zero)


def store_rows(
  ref: Any, scale_ref: Any, layer: Array, entry_S: Array, rows_SxD: Array, mask_S: Array
) -> None:
  """Stores masked rows at entries of one layer, in 8 bits where there is a reference of scales.

  Entries beyond the end of the reference are not stored.
  """
  shape, entries = rows_SxD.shape, ref.shape[1]
  entry_S = jnp.where(mask_S, entry_S, entries)
  mask_S = entry_S < entries
  entry_SxD = jnp.broadcast_to(entry_S[:, None], shape)
  mask_SxD = jnp.broadcast_to(mask_S[:, None], shape)
  rows_SxD, scale_S = pack_rows(rows_SxD, ref.dtype)
  if scale_S is not None:
    plgpu.store(scale_ref.at[jnp.broadcast_to(layer, entry_S.shape), entry_S], scale_S, mask=mask_S)
  column_SxD = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
  layer_SxD = jnp.broadcast_to(layer, shape)
  plgpu.store(ref.at[layer_SxD, entry_SxD, column_SxD], rows_SxD, mask=mask_SxD)
