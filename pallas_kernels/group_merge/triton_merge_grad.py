"""Backward kernel of group merging through Pallas-Triton: one pass over the members of groups.

With p_r the softmax of query head r over a group's members, w = Σ_r p_r / R, and dKᵍ, dVᵍ the
cotangents of the merged key and value:

    dw_j = K_j · dKᵍ + V_j · dVᵍ
    dl_rj = scale · p_rj (dw_j − Σ_i p_ri dw_i) / R
    dK_j = w_j dKᵍ + Σ_r dl_rj q_r,   dV_j = w_j dVᵍ,   dq_r = Σ_j dl_rj K_j
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.group_merge.triton_group_tile import group_softmax, GroupTile
from pallas_kernels.group_merge.triton_row_gather import (
  load_indexed_rows,
  per_tile,
  store_indexed_rows,
  tile,
  whole,
)
from pallas_kernels.head_range import HeadRange
from pallas_kernels.kernel_common import out_struct
from pallas_kernels.triton_common import dot


def merge_rows_grad(
  operands: tuple[Array, Array, Array],
  row_BxNxtxT: Array,
  last_BxNxtxM: Array,
  dgroup: tuple[Array, Array],
  dwindow: tuple[Array, Array] | None,
  onto: tuple[Array, Array, Array],
  *,
  group_tile: GroupTile,
  scale: float,
  heads: HeadRange,
  interpret: bool,
) -> tuple[Array, Array, Array]:
  """Adds the gradients of merging onto those of query, key and value, in place.

  Args:
    operands: query, key and value.
    row_BxNxtxT: the members of groups by tile; see `GroupTile.indices`.
    last_BxNxtxM: the queries that weigh them.
    dgroup: cotangents of the merged keys and values [B, k, N, D].
    dwindow: cotangents of keys and values of the members in group order, [B, k·rows, N, D]. If
      given, the member rows of `onto` are overwritten and not read.
    onto: existing gradients of query, key and value.
    scale: multiplies the merge logits.
    heads: the KV heads of the groups, of more heads of the operands and of `onto`.
  """
  query, key, value = operands
  B, L, _, D = key.shape
  G, tokens = group_tile.groups, whole(key, None, heads.first)
  queries = whole(query, group_tile.heads, heads.first)
  inputs = [query, key, value, row_BxNxtxT, last_BxNxtxM, *dgroup]
  in_specs = [queries, tokens, tokens, per_tile(row_BxNxtxT), per_tile(last_BxNxtxM)]
  in_specs += [tile(G, D)] * 2
  if dwindow is not None:
    inputs += dwindow
    in_specs += [tile(G * group_tile.rows, D)] * 2
  first = len(inputs)
  summed: tuple[Array, Array, Array] = pl.pallas_call(
    functools.partial(
      _merge_grad_kernel,
      length=L,
      group_tile=group_tile,
      scale=scale,
      has_window=dwindow is not None,
    ),
    grid=(row_BxNxtxT.shape[2], heads.size, B),
    in_specs=[*in_specs, queries, tokens, tokens],
    out_specs=[queries, tokens, tokens],
    out_shape=[out_struct(x, x.shape, x.dtype) for x in onto],
    input_output_aliases={first + i: i for i in range(3)},
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="group_merge_grad",
  )(*inputs, *onto)
  return summed


def _merge_grad_kernel(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  row_ref: Any,
  last_ref: Any,
  dgroup_key_ref: Any,
  dgroup_value_ref: Any,
  *refs: Any,
  length: int,
  group_tile: GroupTile,
  scale: float,
  has_window: bool,
) -> None:
  *dwindow, dq_ref, dk_ref, dv_ref, dq_out, dk_out, dv_out = refs
  row_T, last_M = row_ref[...], last_ref[...]
  head_M = jnp.arange(group_tile.queries) % group_tile.heads
  slot_S = jnp.arange(group_tile.slots)
  q_MxD = load_indexed_rows(q_ref, last_M, head_M, length=length)
  k_TxD, v_TxD = (load_indexed_rows(ref, row_T, length=length) for ref in (k_ref, v_ref))
  dkey_SxD, dvalue_SxD = (
    load_indexed_rows(ref, slot_S, length=group_tile.groups)
    for ref in (dgroup_key_ref, dgroup_value_ref)
  )
  mask_MxT, holds_SxT = group_tile.weighs(), group_tile.holds()
  dtype = k_TxD.dtype
  dw_SxT = dot(dkey_SxD, k_TxD, trans_b=True) + dot(dvalue_SxD, v_TxD, trans_b=True)
  dw_T = jnp.where(holds_SxT, dw_SxT, 0.0).sum(axis=0)
  p_MxT = group_softmax(dot(q_MxD, k_TxD, trans_b=True) * scale, mask_MxT)
  mean_M = (p_MxT * dw_T[None]).sum(axis=1)
  dl_MxT = scale / group_tile.heads * p_MxT * (dw_T[None] - mean_M[:, None])
  dl_MxT = dl_MxT.astype(dtype)
  w_T = p_MxT.sum(axis=0) / group_tile.heads
  w_TxS = jnp.where(holds_SxT, w_T[None], 0.0).astype(dtype).T

  dq_MxD = dot(dl_MxT, k_TxD)
  dq_MxD += load_indexed_rows(dq_ref, last_M, head_M, length=length).astype(jnp.float32)
  store_indexed_rows(dq_out, last_M, dq_MxD, head_M, length=length)
  target_T = jnp.arange(group_tile.width)
  for i, (d_TxD, ref, out) in enumerate(
    (
      (dot(w_TxS, dkey_SxD) + dot(dl_MxT.T, q_MxD), dk_ref, dk_out),
      (dot(w_TxS, dvalue_SxD), dv_ref, dv_out),
    )
  ):
    if has_window:
      other = load_indexed_rows(dwindow[i], target_T, length=group_tile.groups * group_tile.rows)
    else:
      other = load_indexed_rows(ref, row_T, length=length)
    store_indexed_rows(out, row_T, d_TxD + other.astype(jnp.float32), length=length)
