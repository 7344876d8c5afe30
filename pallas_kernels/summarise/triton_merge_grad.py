"""Backward kernel of merging, through Pallas-Triton: one pass over the members of groups.

With p_r the softmax of query head r over a group's members, w = Σ_r p_r / R, and dKⁿ, dVⁿ the
cotangents of the merged key and value:

    dw_j = K_j · dKⁿ + V_j · dVⁿ
    dl_rj = scale · p_rj (dw_j − Σ_i p_ri dw_i) / R
    dK_j = w_j dKⁿ + Σ_r dl_rj q_r,   dV_j = w_j dVⁿ,   dq_r = Σ_j dl_rj K_j
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.summarise.triton_merge import (
  group_logits,
  GroupTile,
  heads_spec,
  masked_softmax,
)
from pallas_kernels.summarise.triton_rows import like, load_rows, store_rows, tile, whole


def merge_rows_grad(
  operands: tuple[Array, Array, Array],
  row_BxNxkxP: Array,
  last_BxNxk: Array,
  dgroup: tuple[Array, Array],
  dwindow: tuple[Array, Array] | None,
  onto: tuple[Array, Array, Array],
  *,
  rows: int,
  scale: float,
  group_tile: GroupTile,
  interpret: bool,
) -> tuple[Array, Array, Array]:
  """Adds the gradients of merging onto those of query, key and value, in place.

  Args:
    operands: query, key and value.
    row_BxNxkxP: the members of groups, as for `merge_rows`.
    last_BxNxk: the query that weighs them.
    dgroup: cotangents of the merged keys and values [B, k, N, D].
    dwindow: cotangents of the members' keys and values one after the other, [B, k·rows, N, D]:
      they then take the place of what `onto` holds in a member's row, which is not read.
    onto: gradients that are there already: of the query, and of keys and values.
    rows: members of a group.
    scale: of the merge logits.
  """
  query, key, value = operands
  B, L, N, _ = key.shape
  k = last_BxNxk.shape[-1]
  G = group_tile.groups
  tokens = whole(key)
  inputs = [query, key, value, row_BxNxkxP, last_BxNxk, *dgroup]
  in_specs = [
    heads_spec(query, N),
    tokens,
    tokens,
    group_tile.rows_spec(row_BxNxkxP),
    group_tile.query_spec(last_BxNxk),
    tile(dgroup[0], G),
    tile(dgroup[1], G),
  ]
  if dwindow is not None:
    inputs += dwindow
    in_specs += [tile(dwindow[0], G * rows)] * 2
  gradient_specs = [heads_spec(query, N), tokens, tokens]
  first = len(inputs)
  summed: tuple[Array, Array, Array] = pl.pallas_call(
    functools.partial(
      _merge_grad_kernel, length=L, rows=rows, scale=scale, has_window=dwindow is not None
    ),
    grid=(k // G, N, B),
    in_specs=in_specs + gradient_specs,
    out_specs=gradient_specs,
    out_shape=[like(x, x.shape, x.dtype) for x in onto],
    input_output_aliases={first + i: i for i in range(3)},
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="summarise_merge_grad",
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
  rows: int,
  scale: float,
  has_window: bool,
) -> None:
  *dwindow, dq_ref, dk_ref, dv_ref, dq_out, dk_out, dv_out = refs
  row_GxP, last_G = row_ref[...], last_ref[...]
  G, P = row_GxP.shape
  D = k_ref.shape[-1]
  row_T = row_GxP.reshape(G * P)
  k_GxPxD, v_GxPxD = (
    load_rows(ref, row_T, length=length).reshape(G, P, D).astype(jnp.float32)
    for ref in (k_ref, v_ref)
  )
  lane_GxP = jnp.broadcast_to(jnp.arange(P)[None], (G, P))
  member_GxP = lane_GxP < rows
  dkey_GxD = dgroup_key_ref[...].astype(jnp.float32)
  dvalue_GxD = dgroup_value_ref[...].astype(jnp.float32)
  dw_GxP = (k_GxPxD * dkey_GxD[:, None] + v_GxPxD * dvalue_GxD[:, None]).sum(axis=-1)
  heads = group_logits(q_ref, last_G, k_GxPxD, length=length)
  w_GxP = jnp.zeros((G, P), jnp.float32)
  dk_GxPxD = jnp.zeros((G, P, D), jnp.float32)
  for r, (q_GxD, logits_GxP) in enumerate(heads):
    p_GxP = masked_softmax(logits_GxP * scale, member_GxP) / len(heads)
    w_GxP += p_GxP
    mean_G = (p_GxP * dw_GxP).sum(axis=1) * len(heads)
    dl_GxP = scale * p_GxP * (dw_GxP - mean_G[:, None])
    dk_GxPxD += dl_GxP[..., None] * q_GxD[:, None]
    dq_GxD = (dl_GxP[..., None] * k_GxPxD).sum(axis=1)
    dq_GxD += load_rows(dq_ref, last_G, r, length=length).astype(jnp.float32)
    store_rows(dq_out, last_G, dq_GxD, r, length=length)
  dk_GxPxD += w_GxP[..., None] * dkey_GxD[:, None]
  dv_GxPxD = w_GxP[..., None] * dvalue_GxD[:, None]
  place_GxP = jnp.where(member_GxP, jnp.arange(G)[:, None] * rows + lane_GxP, G * rows)
  for i, (d_GxPxD, ref, out) in enumerate(((dk_GxPxD, dk_ref, dk_out), (dv_GxPxD, dv_ref, dv_out))):
    d_TxD = d_GxPxD.reshape(G * P, D)
    if has_window:
      there = load_rows(dwindow[i], place_GxP.reshape(G * P), length=G * rows)
    else:
      there = load_rows(ref, row_T, length=length)
    store_rows(out, row_T, d_TxD + there.astype(jnp.float32), length=length)
