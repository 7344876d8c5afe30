"""Backward kernel of group merging for TPUs: one pass over the rows of groups.

With p_r the softmax of query head r over a group's members, w = Σ_r p_r / R, and dKᵍ, dVᵍ the
cotangents of the merged key and value:

    dw_j = K_j · dKᵍ + V_j · dVᵍ
    dl_rj = scale · p_rj (dw_j − Σ_i p_ri dw_i) / R
    dK_j = w_j dKᵍ + Σ_r dl_rj q_r,   dV_j = w_j dVᵍ,   dq_r = Σ_j dl_rj K_j

A focal row gets the cotangents of its copy instead.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.group_merge.mosaic_tpu_merge import group_softmax, Groups, PART, part_of
from pallas_kernels.kernel_common import out_struct
from pallas_kernels.mosaic_tpu_common import dot, Interpret


def merge_rows_grad(
  operands: tuple[Array, Array, Array],
  slot: list[Array],
  cotangents: list[Array],
  groups: Groups,
  *,
  interpret: Interpret,
) -> tuple[Array, Array, Array]:
  """Gradients of the query, and of the groups' rows of key and value.

  Args:
    operands: the query, key and value of `merge_rows`.
    slot: its last result if rows were chosen, else empty.
    cotangents: of its other results.
    groups: the layout of the groups.
  """
  query, key, value = operands
  B, N = key.shape[:2]
  in_specs = [groups.query_spec(), groups.spec(groups.rows), groups.spec(groups.rows)]
  in_specs += [groups.spec(1)] * 2
  if groups.focal:
    in_specs += [groups.spec(groups.focal)] * 2 + [groups.slot_spec()]
  num_rows = groups.count * groups.rows
  rows_shape = (B, N, num_rows, groups.head_dim)
  elements = B * N * num_rows * groups.head_dim
  grads: tuple[Array, Array, Array] = pl.pallas_call(
    functools.partial(_kernel, groups=groups),
    grid=(B, N, groups.tiles),
    in_specs=in_specs,
    out_specs=in_specs[:3],
    out_shape=[
      out_struct(query, query.shape, query.dtype),
      *[out_struct(key, rows_shape, key.dtype)] * 2,
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
    cost_estimate=pl.CostEstimate(
      flops=2 * elements * PART * (3 * groups.heads + 4 + 2 * groups.focal),
      bytes_accessed=elements * groups.itemsize * (4 + (4 + 2 * groups.heads) // groups.rows),
      transcendentals=B * N * num_rows * groups.heads * PART,
    ),
    interpret=interpret,
    name="group_merge_grad",
  )(query, key, value, *cotangents, *slot)
  return grads


def _kernel(q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any, groups: Groups) -> None:
  for i in range(groups.parts):
    _part(i, q_ref, k_ref, v_ref, *refs, groups=groups)


def _part(i: int, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any, groups: Groups) -> None:
  *cotangent_refs, dq_ref, dk_ref, dv_ref = refs
  left = groups.count - pl.program_id(2) * groups.tile - i * PART
  at = pl.ds(i * PART, PART)
  q_MxD = _existing(q_ref[:, at, :], left).reshape(-1, groups.head_dim)
  k_TxD, v_TxD = (
    _existing(part_of(ref, i, groups.rows)[...], left * groups.rows) for ref in (k_ref, v_ref)
  )
  dkey_SxD, dvalue_SxD = (_existing(part_of(ref, i, 1)[...], left) for ref in cotangent_refs[:2])
  mask_MxT, holds_SxT, dtype = groups.weighs(), groups.holds(), k_TxD.dtype
  if groups.focal:
    slot_1xT = cotangent_refs[4][pl.ds(i, 1), :]
    mask_MxT &= slot_1xT < 0
    holds_SxT &= slot_1xT < 0
  dw_SxT = dot(dkey_SxD, k_TxD, (1, 1)) + dot(dvalue_SxD, v_TxD, (1, 1))
  dw_1xT = jnp.where(holds_SxT, dw_SxT, 0.0).sum(axis=0, keepdims=True)
  p_MxT = group_softmax(dot(q_MxD, k_TxD, (1, 1)) * groups.scale, mask_MxT)
  mean_Mx1 = (p_MxT * dw_1xT).sum(axis=1, keepdims=True)
  dl_MxT = (groups.scale / groups.heads * p_MxT * (dw_1xT - mean_Mx1)).astype(dtype)
  w_1xT = p_MxT.sum(axis=0, keepdims=True) * (1 / groups.heads)
  w_SxT = jnp.where(holds_SxT, w_1xT, 0.0).astype(dtype)
  dk_TxD = dot(w_SxT, dkey_SxD, (0, 0)) + dot(dl_MxT, q_MxD, (0, 0))
  dv_TxD = dot(w_SxT, dvalue_SxD, (0, 0))
  if groups.focal:
    picks_FxT = groups.picks(slot_1xT).astype(dtype)
    dfocal_key_FxD, dfocal_value_FxD = (
      _existing(part_of(ref, i, groups.focal)[...], left * groups.focal)
      for ref in cotangent_refs[2:4]
    )
    dk_TxD += dot(picks_FxT, dfocal_key_FxD, (0, 0))
    dv_TxD += dot(picks_FxT, dfocal_value_FxD, (0, 0))
  dq_MxD = dot(dl_MxT, k_TxD).astype(dq_ref.dtype)
  dq_ref[:, at, :] = dq_MxD.reshape(groups.heads, PART, groups.head_dim)
  part_of(dk_ref, i, groups.rows)[...] = dk_TxD.astype(dk_ref.dtype)
  part_of(dv_ref, i, groups.rows)[...] = dv_TxD.astype(dv_ref.dtype)


def _existing(x: Array, rows: Array) -> Array:
  """[..., T, D] with zeros from row `rows` on: the last tile may reach past the groups."""
  row = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 2)
  return jnp.where(row < rows, x, jnp.zeros_like(x))
