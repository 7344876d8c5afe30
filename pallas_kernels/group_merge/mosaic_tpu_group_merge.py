"""Group merging on a TPU: rows of non-consecutive groups are gathered first, then merged.

Kernels take heads before tokens, as the attention kernels do: XLA then writes the projections in
that layout, and nothing is transposed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.dispatch import refuse
from pallas_kernels.group_merge.entries import Entries, num_blocks
from pallas_kernels.group_merge.mosaic_tpu_merge import Groups, merge_rows
from pallas_kernels.group_merge.mosaic_tpu_merge_grad import merge_rows_grad
from pallas_kernels.group_merge.mosaic_tpu_row_gather import gather_rows, scatter_rows
from pallas_kernels.head_range import all_heads, HeadRange
from pallas_kernels.mosaic_tpu_common import Interpret

_MAX_ROWS = 128  # of a group or block: a kernel holds it in registers
_MAX_FOCAL = 16  # of a block: a kernel chooses them one by one
_MAX_LENGTH = 2**19  # of a row of tokens
_MAX_SCALARS = 2**17  # indices in scalar memory: one for 128 rows that are copied


def merge_groups_mosaic_tpu(
  query: Array,
  key: Array,
  value: Array,
  focal_index: Array,
  member_index: Array,
  group_query: Array,
  *,
  scale: float,
  reorder_window: bool,
  heads: HeadRange | None = None,
  interpret: Interpret = False,
) -> tuple[Array, Entries]:
  """See `merge_groups`.

  Raises:
    NotImplementedError: for the reasons of `merge_groups_refusal`.
  """
  refuse(merge_groups_refusal(query, key, value, focal_index, member_index, group_query))
  B, N, k, m = member_index.shape
  whole, heads = (query, key, value), heads or all_heads(key)
  query, key, value = (heads.of(x, whole[1].shape[2]) for x in whole)
  query_BxHxLxD, *tokens = (x.swapaxes(1, 2) for x in (query, key, value))
  members = _take(tuple(tokens), member_index.reshape(B, N, k * m), interpret)
  focal = _take(tuple(tokens), focal_index, interpret)
  (weighing,) = _take((query_BxHxLxD,), group_query, interpret)
  groups = _groups(query, key, k, m, 0, scale)
  merged = _merge(weighing, *members, groups, interpret)
  window = [x.swapaxes(1, 2) for x in members] if reorder_window else whole[1:]
  return whole[0], Entries(*(x.swapaxes(1, 2) for x in (*focal, *merged)), *window)


def merge_blocks_mosaic_tpu(
  query: Array,
  key: Array,
  value: Array,
  start: Array | None,
  *,
  members: int,
  focal: int,
  scale: float,
  first: int = 0,
  heads: HeadRange | None = None,
  interpret: Interpret = False,
) -> tuple[Array, Entries, Array]:
  """See `merge_blocks`.

  Raises:
    NotImplementedError: for the reasons of `merge_blocks_refusal`.
  """
  refuse(merge_blocks_refusal(query, key, value, start, members=members, focal=focal, first=first))
  whole, heads = (query, key, value), heads or all_heads(key)
  query, key, value = (heads.of(x, whole[1].shape[2]) for x in whole)
  B, L, N, _ = key.shape
  size = members + focal
  query_BxHxLxD, *rows = (x.swapaxes(1, 2) for x in (query, key, value))
  if start is None:
    k = num_blocks(L, size, first)
    rows = [x[:, :, first:] for x in rows]
    weighing = query_BxHxLxD[:, :, first + size - 1 : first + k * size : size]
  else:
    k = start.shape[1]
    start_Bx1xkx1 = start[:, None, :, None]
    row_Bx1xkxP = start_Bx1xkx1 + jnp.arange(size, dtype=jnp.int32)[None, None, None]
    row_Bx1xkxP = jnp.where(start_Bx1xkx1 < L, row_Bx1xkxP, L)
    row_BxNxkxP = jnp.broadcast_to(row_Bx1xkxP, (B, N, k, size))
    rows = list(_take(tuple(rows), row_BxNxkxP.reshape(B, N, k * size), interpret))
    (weighing,) = _take((query_BxHxLxD,), row_BxNxkxP[..., -1], interpret)
  groups = _groups(query, key, k, size, focal, scale)
  *merged, slot = _merge(weighing, *rows, groups, interpret)
  group_key, group_value, focal_key, focal_value = (x.swapaxes(1, 2) for x in merged)
  entries = Entries(focal_key, focal_value, group_key, group_value, *whole[1:])
  return whole[0], entries, _offsets(slot, groups)


def merge_groups_refusal(
  query: Array, key: Array, value: Array, focal: Array, member: Array, last: Array, **_: Any
) -> str | None:
  """Why these kernels cannot run a call of `merge_groups`; None if they can."""
  del value, focal, last
  return _refusal(query, key, *member.shape[-2:], focal=0)


def merge_blocks_refusal(
  query: Array,
  key: Array,
  value: Array,
  start: Array | None,
  *,
  members: int,
  focal: int,
  first: int = 0,
  **_: Any,
) -> str | None:
  """Why these kernels cannot run a call of `merge_blocks`; None if they can."""
  del value
  size = members + focal
  count = num_blocks(key.shape[1], size, first) if start is None else start.shape[1]
  return _refusal(query, key, count, size, focal=focal)


def _refusal(query: Array, key: Array, count: int, rows: int, *, focal: int) -> str | None:
  """For `count` groups or blocks of `rows` tokens."""
  B, L, N, D = key.shape
  if D % 8 or D > 256:
    return f"head_dim is {D}; it must be a multiple of 8, at most 256"
  if query.dtype not in (jnp.bfloat16, jnp.float32):
    return f"dtype is {query.dtype}; it must be bfloat16 or float32"
  if rows > _MAX_ROWS or focal > _MAX_FOCAL:
    return (
      f"a group or block has {rows} tokens, {focal} of them chosen; at most {_MAX_ROWS} and "
      f"{_MAX_FOCAL} are possible"
    )
  if 0 in key.shape:
    return f"key has shape {key.shape}; it may not be empty"
  scalars = B * N * (max(L, count * rows) // 128 + L // 512)
  if L > _MAX_LENGTH or scalars > _MAX_SCALARS:
    return f"key has shape {key.shape}; indices of its rows do not fit scalar memory"
  return None


def _groups(query: Array, key: Array, count: int, rows: int, focal: int, scale: float) -> Groups:
  _, _, N, D = key.shape
  return Groups(count, rows, focal, query.shape[2] // N, D, key.dtype.itemsize, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take(arrays: tuple[Array, ...], index: Array, interpret: Interpret) -> tuple[Array, ...]:
  """Rows [B, N·a, S, D] of arrays [B, N·a, L, D]; see `gather_rows`."""
  if index.shape[-1] == 0:
    return tuple(x[:, :, :0] for x in arrays)
  return gather_rows(arrays, index, interpret=interpret)


def _take_fwd(
  arrays: tuple[Array, ...], index: Array, interpret: Interpret
) -> tuple[tuple[Array, ...], tuple[Array, int]]:
  return _take(arrays, index, interpret), (index, arrays[0].shape[2])


def _take_bwd(
  interpret: Interpret, residuals: tuple[Array, int], cotangents: tuple[Array, ...]
) -> tuple[tuple[Array, ...], None]:
  index, length = residuals
  if index.shape[-1] == 0:
    return tuple(jnp.zeros((*d.shape[:2], length, d.shape[3]), d.dtype) for d in cotangents), None
  return scatter_rows(cotangents, index, length, interpret=interpret), None


_take.defvjp(_take_fwd, _take_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _merge(
  query: Array, key: Array, value: Array, groups: Groups, interpret: Interpret
) -> list[Array]:
  """See `merge_rows`."""
  if groups.count == 0:
    none = key[:, :, :0]
    slot = jnp.zeros((*key.shape[:2], 0, 0, 0), jnp.int32)
    return [none] * 4 + [slot] if groups.focal else [none] * 2
  return merge_rows(query, key, value, groups, interpret=interpret)


def _merge_fwd(
  query: Array, key: Array, value: Array, groups: Groups, interpret: Interpret
) -> tuple[list[Array], tuple[Array, ...]]:
  merged = _merge(query, key, value, groups, interpret)
  return merged, (query, key, value, *merged[4:])


def _merge_bwd(
  groups: Groups, interpret: Interpret, residuals: tuple[Array, ...], cotangents: list[Array]
) -> tuple[Array, Array, Array]:
  query, key, value, *slot = residuals
  if groups.count == 0:
    return jnp.zeros_like(query), jnp.zeros_like(key), jnp.zeros_like(value)
  dquery, *drows = merge_rows_grad(
    (query, key, value), slot, cotangents[:4], groups, interpret=interpret
  )
  after = key.shape[2] - groups.count * groups.rows
  dkey, dvalue = (jnp.pad(d, ((0, 0), (0, 0), (0, after), (0, 0))) for d in drows)
  return dquery, dkey, dvalue


_merge.defvjp(_merge_fwd, _merge_bwd)


def _offsets(slot: Array, groups: Groups) -> Array:
  """[B, N, k, focal]: the offsets in their group of the focal rows, ascending."""
  B, N = slot.shape[:2]
  slot_BxNxkx1xP = slot.reshape(B, N, -1, 1, groups.rows)[:, :, : groups.count]
  j_f = jnp.arange(groups.focal, dtype=jnp.int32)[None, None, None, :, None]
  offset_P = jnp.arange(groups.rows, dtype=jnp.int32)[None, None, None, None]
  return jnp.where(slot_BxNxkx1xP == j_f, offset_P, 0).sum(axis=-1)
