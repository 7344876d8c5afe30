"""Forward kernel of group merging through Pallas-Triton: reads each key and value once.

A program holds a tile of groups. One small product has the logits of their queries and all their
rows, of which each query uses its own group's. Under streaming selection the rows are whole
blocks, and the kernel first chooses their focal rows.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
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


def merge_rows(
  query: Array,
  key: Array,
  value: Array,
  row_BxnxtxT: Array,
  last_BxnxtxM: Array,
  *,
  group_tile: GroupTile,
  focal: int,
  scale: float,
  reorder: bool,
  heads: HeadRange,
  interpret: bool,
) -> list[Array]:
  """Group keys and values [B, k, N, D], followed by optional outputs.

  Args:
    row_BxnxtxT: the rows of each tile; n is N or 1. See `GroupTile.indices`.
    last_BxnxtxM: the queries that weigh them.
    focal: how many rows of each group the kernel chooses to stay focal. If not 0, it also returns
      their keys and values [B, k·focal, N, D], and last their offsets in the group
      [B, N, k, focal].
    scale: multiplies the merge logits.
    reorder: also returns keys and values of all rows in group order, [B, k·rows, N, D].
    heads: the N KV heads of the results, of more heads of query, key and value.
  """
  B, L, _, D = key.shape
  N = heads.size
  tiles, G, rows = row_BxnxtxT.shape[2], group_tile.groups, group_tile.rows
  counts = [G, G]
  counts += [G * focal] * 2 if focal else []
  counts += [G * rows] * 2 if reorder else []
  out_shape = [out_struct(key, (B, tiles * count, N, D), key.dtype) for count in counts]
  out_specs = [tile(count, D) for count in counts]
  if focal:
    out_shape.append(out_struct(key, (B, N, tiles * G, focal), jnp.int32))
    out_specs.append(pl.BlockSpec((None, None, G, focal), lambda t, n, b: (b, n, t, 0)))
  merged: list[Array] = pl.pallas_call(
    functools.partial(
      _merge_kernel,
      length=L,
      group_tile=group_tile,
      focal=focal,
      scale=scale,
      reorder=reorder,
    ),
    grid=(tiles, N, B),
    in_specs=[
      whole(query, group_tile.heads, heads.first),
      whole(key, None, heads.first),
      whole(value, None, heads.first),
      per_tile(row_BxnxtxT),
      per_tile(last_BxnxtxM),
    ],
    out_specs=out_specs,
    out_shape=out_shape,
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="group_merge",
  )(query, key, value, row_BxnxtxT, last_BxnxtxM)
  return merged


def _merge_kernel(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  row_ref: Any,
  last_ref: Any,
  *out_refs: Any,
  length: int,
  group_tile: GroupTile,
  focal: int,
  scale: float,
  reorder: bool,
) -> None:
  row_T = row_ref[...]
  D = k_ref.shape[-1]
  q_MxD = load_indexed_rows(
    q_ref, last_ref[...], jnp.arange(group_tile.queries) % group_tile.heads, length=length
  )
  k_TxD, v_TxD = (load_indexed_rows(ref, row_T, length=length) for ref in (k_ref, v_ref))
  logits_MxT = dot(q_MxD, k_TxD, trans_b=True)
  mask_MxT, holds_SxT = group_tile.weighs(), group_tile.holds()
  member_T = jnp.arange(group_tile.width) < group_tile.groups * group_tile.rows
  if focal:
    scores_T = group_softmax(logits_MxT * D**-0.5, mask_MxT).sum(axis=0)
    chosen_ref = out_refs[-1]
    focal_SxF = _choose(scores_T, holds_SxT, focal)
    chosen_T = _store_focal(
      focal_SxF, row_T, (k_ref, v_ref), out_refs[2:4], chosen_ref, group_tile, length
    )
    member_T &= ~chosen_T
    mask_MxT &= member_T[None]
  weights_T = group_softmax(logits_MxT * scale, mask_MxT).sum(axis=0) / group_tile.heads
  member_SxT = holds_SxT & member_T[None]
  weights_SxT = jnp.where(member_SxT, weights_T[None], 0.0)
  slot_S = jnp.arange(group_tile.slots)
  for x_TxD, out_ref, is_value in ((k_TxD, out_refs[0], False), (v_TxD, out_refs[1], True)):
    merged_SxD = _weighted(weights_SxT, member_SxT, x_TxD, is_value=is_value)
    store_indexed_rows(out_ref, slot_S, merged_SxD, length=group_tile.groups)
  if reorder:
    target_T, rows = jnp.arange(group_tile.width), group_tile.groups * group_tile.rows
    for x_TxD, out_ref in ((k_TxD, out_refs[2]), (v_TxD, out_refs[3])):
      store_indexed_rows(out_ref, target_T, x_TxD, length=rows)


def _weighted(weights_SxT: Array, member_SxT: Array, x_TxD: Array, *, is_value: bool) -> Array:
  """weights @ x, exact to float32. A non-finite row makes only its own group NaN.

  Args:
    weights_SxT: of the members.
    member_SxT: which rows are members of a group.
    x_TxD: keys or values.
    is_value: whether x are values, in which NaN weights count as 0; see `xla.merge`.
  """
  merged_SxD = _product(weights_SxT, x_TxD)
  # A non-finite row makes its column of all groups non-finite, because 0 · inf is NaN.
  is_odd = jnp.where(merged_SxD - merged_SxD == 0, 0, 1).max(axis=1).max() > 0
  return lax.cond(
    is_odd,
    lambda: _weighted_apart(weights_SxT, member_SxT, x_TxD, is_value=is_value),
    lambda: merged_SxD,
  )


def _weighted_apart(
  weights_SxT: Array, member_SxT: Array, x_TxD: Array, *, is_value: bool
) -> Array:
  """`_weighted` for tiles with non-finite rows, which it leaves out of the product."""
  if is_value:
    weights_SxT = jnp.where(weights_SxT == weights_SxT, weights_SxT, 0.0)
  wide_TxD = x_TxD.astype(jnp.float32)
  odd_T = (wide_TxD - wide_TxD).sum(axis=1) != 0  # inf − inf is NaN, which is not 0
  x_TxD = jnp.where(odd_T[:, None], 0, x_TxD).astype(x_TxD.dtype)
  odd_S = jnp.where(member_SxT & odd_T[None], 1, 0).max(axis=1) > 0
  return jnp.where(odd_S[:, None], jnp.nan, _product(weights_SxT, x_TxD))


def _product(weights_SxT: Array, x_TxD: Array) -> Array:
  """weights @ x of float32 weights."""
  high_SxT = weights_SxT.astype(x_TxD.dtype)
  merged_SxD = dot(high_SxT, x_TxD)
  if x_TxD.dtype != jnp.float32:  # the rounding error of the narrow weights
    merged_SxD += dot((weights_SxT - high_SxT.astype(jnp.float32)).astype(x_TxD.dtype), x_TxD)
  return merged_SxD


def _choose(scores_T: Array, holds_SxT: Array, focal: int) -> list[Array]:
  """The rows of highest score in each group, ascending; T where a group does not exist."""
  T = scores_T.shape[0]
  # NaN is the largest score, as for a sort.
  scores_T = jnp.where(scores_T == scores_T, scores_T, jnp.inf)
  row_SxT = jnp.broadcast_to(jnp.arange(T)[None], holds_SxT.shape)
  left_SxT = holds_SxT
  for _ in range(focal):
    score_SxT = jnp.where(left_SxT, scores_T[None], -1.0)
    top_SxT = left_SxT & (score_SxT == score_SxT.max(axis=1)[:, None])
    first_S = jnp.where(top_SxT, row_SxT, T).min(axis=1)
    left_SxT &= row_SxT != first_S[:, None]
  chosen_SxT = holds_SxT & ~left_SxT
  found: list[Array] = []
  for _ in range(focal):
    later_SxT = chosen_SxT & (row_SxT > found[-1][:, None]) if found else chosen_SxT
    found.append(jnp.where(later_SxT, row_SxT, T).min(axis=1))
  return found


def _store_focal(
  focal_SxF: list[Array],
  row_T: Array,
  token_refs: tuple[Any, Any],
  out_refs: Any,
  chosen_ref: Any,
  group_tile: GroupTile,
  length: int,
) -> Array:
  """Writes the focal rows and their offsets in the group; returns [T] bool, which rows they are."""
  T, G = group_tile.width, group_tile.groups
  slot_S = jnp.arange(group_tile.slots)
  exists_S = slot_S < G
  chosen_T = jnp.arange(T) < 0
  # All loads come before the stores: the compiler moves no load past a store.
  loaded = []
  for row_S in focal_SxF:
    is_it_SxT = jnp.arange(T)[None] == row_S[:, None]
    chosen_T |= jnp.where(is_it_SxT, 1, 0).max(axis=0) > 0
    source_S = jnp.where(is_it_SxT, row_T[None], 0).sum(axis=1)
    source_S = jnp.where(exists_S, source_S, length)
    loaded.append([load_indexed_rows(ref, source_S, length=length) for ref in token_refs])
  for j, (row_S, rows) in enumerate(zip(focal_SxF, loaded, strict=True)):
    at = chosen_ref.at[slot_S, jnp.full(slot_S.shape, j)]
    plgpu.store(at, row_S - slot_S * group_tile.rows, mask=exists_S)
    target_S = jnp.where(exists_S, slot_S * len(focal_SxF) + j, G * len(focal_SxF))
    for out_ref, x_SxD in zip(out_refs, rows, strict=True):
      store_indexed_rows(out_ref, target_S, x_SxD, length=G * len(focal_SxF))
  return chosen_T
