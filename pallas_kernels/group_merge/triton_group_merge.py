"""Group merging through Pallas-Triton: index arrays, and the gradients.

The query is an output too, and under streaming selection so are key and value, as the window. The
backward pass then receives all other gradients of these arrays and adds its own in place; a sum
outside would read and write the whole arrays once more.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.dispatch import refuse
from pallas_kernels.group_merge.entries import block_indices, block_starts, Entries
from pallas_kernels.group_merge.triton_group_tile import GroupTile, pad_index
from pallas_kernels.group_merge.triton_merge import merge_rows
from pallas_kernels.group_merge.triton_merge_grad import merge_rows_grad
from pallas_kernels.group_merge.triton_row_gather import gather_rows, ROWS, scatter_rows
from pallas_kernels.head_range import all_heads, HeadRange
from pallas_kernels.triton_common import head_refusal

_FORWARD, _BACKWARD = 128 * 128, 64 * 128  # keys × head dim of a tile
_MAX_ROWS = 128  # of a group or block: a program holds it in registers


@dataclasses.dataclass(frozen=True)
class _Static:
  scale: float
  heads: HeadRange
  reorder: bool = False
  members: int = 0
  focal: int = 0
  interpret: bool = False


def merge_groups_triton(
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
  interpret: bool = False,
) -> tuple[Array, Entries]:
  """See `merge_groups`.

  Raises:
    NotImplementedError: for the reasons of `merge_groups_refusal`.
  """
  refuse(merge_groups_refusal(query, key, value, focal_index, member_index, group_query))
  static = _Static(scale, heads or all_heads(key), reorder=reorder_window, interpret=interpret)
  return _merge_groups(query, key, value, (focal_index, member_index, group_query), static)


def merge_blocks_triton(
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
  interpret: bool = False,
) -> tuple[Array, Entries, Array]:
  """See `merge_blocks`.

  Raises:
    NotImplementedError: for the reasons of `merge_blocks_refusal`.
  """
  refuse(merge_blocks_refusal(query, key, value, start, members=members, focal=focal))
  start = block_starts(start, key, members + focal, first)
  static = _Static(
    scale, heads or all_heads(key), members=members, focal=focal, interpret=interpret
  )
  query, entries, chosen = _merge_blocks(query, key, value, start, static)
  return query, entries, chosen[:, :, : start.shape[1]]


def merge_groups_refusal(
  query: Array, key: Array, value: Array, focal: Array, member: Array, last: Array, **_: Any
) -> str | None:
  """Why these kernels cannot run a call of `merge_groups`; None if they can."""
  del value, focal, last
  return _refusal(query, key, member.shape[-1])


def merge_blocks_refusal(
  query: Array, key: Array, value: Array, start: Array | None, *, members: int, focal: int, **_: Any
) -> str | None:
  """Why these kernels cannot run a call of `merge_blocks`; None if they can."""
  del value, start
  return _refusal(query, key, members + focal)


def _refusal(query: Array, key: Array, rows: int) -> str | None:
  """For groups or blocks of `rows` tokens."""
  if reason := head_refusal(query):
    return reason
  if rows > _MAX_ROWS:
    return f"a group or block has {rows} tokens; at most {_MAX_ROWS} fit a kernel's registers"
  if 0 in key.shape:
    return f"key has shape {key.shape}; it may not be empty"
  return None


Indices = tuple[Array, Array, Array]  # of focal tokens, members and group queries


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _merge_groups(
  query: Array, key: Array, value: Array, indices: Indices, static: _Static
) -> tuple[Array, Entries]:
  return _merge_groups_fwd(query, key, value, indices, static)[0]


def _merge_groups_fwd(
  query: Array, key: Array, value: Array, indices: Indices, static: _Static
) -> tuple[tuple[Array, Entries], tuple]:
  focal_index, member_index, group_query = indices
  L, m = key.shape[1], member_index.shape[-1]
  focal = gather_rows(
    key,
    value,
    pad_index(focal_index, 2, ROWS, L),
    first_head=static.heads.first,
    interpret=static.interpret,
  )
  group_tile = _group_tile(query, key, m, _FORWARD)
  group_key, group_value, *window = merge_rows(
    query,
    key,
    value,
    *group_tile.indices(member_index, group_query, L),
    group_tile=group_tile,
    focal=0,
    scale=static.scale,
    reorder=static.reorder,
    heads=static.heads,
    interpret=static.interpret,
  )
  entries = Entries(*focal, group_key, group_value, *(window or (key, value)))
  return (query, entries), (query, key, value, indices)


def _merge_groups_bwd(static: _Static, residuals: tuple, cotangents: tuple) -> tuple:
  query, key, value, indices = residuals
  dquery, d = cotangents
  return *_add_gradients(query, key, value, indices, dquery, d, static), None


_merge_groups.defvjp(_merge_groups_fwd, _merge_groups_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _merge_blocks(
  query: Array, key: Array, value: Array, start: Array, static: _Static
) -> tuple[Array, Entries, Array]:
  return _merge_blocks_fwd(query, key, value, start, static)[0]


def _merge_blocks_fwd(
  query: Array, key: Array, value: Array, start: Array, static: _Static
) -> tuple[tuple[Array, Entries, Array], tuple]:
  L, size = key.shape[1], static.members + static.focal
  group_tile = _group_tile(query, key, size, _FORWARD)
  row_BxkxP = start[..., None] + jnp.arange(size, dtype=jnp.int32)[None, None]
  row_BxkxP = jnp.where(start[..., None] < L, row_BxkxP, L)
  group_key, group_value, focal_key, focal_value, chosen = merge_rows(
    query,
    key,
    value,
    *group_tile.indices(row_BxkxP[:, None], row_BxkxP[:, None, :, -1], L),
    group_tile=group_tile,
    focal=static.focal,
    scale=static.scale,
    reorder=False,
    heads=static.heads,
    interpret=static.interpret,
  )
  entries = Entries(focal_key, focal_value, group_key, group_value, key, value)
  return (query, entries, chosen), (query, key, value, start, chosen)


def _merge_blocks_bwd(static: _Static, residuals: tuple, cotangents: tuple) -> tuple:
  query, key, value, start, chosen = residuals
  dquery, d, _ = cotangents
  chosen = chosen[:, :, : start.shape[1]]
  indices = block_indices(start, chosen, static.members, key.shape[1])
  return *_add_gradients(query, key, value, indices, dquery, d, static), None


_merge_blocks.defvjp(_merge_blocks_fwd, _merge_blocks_bwd)


def _group_tile(query: Array, key: Array, rows: int, elements: int) -> GroupTile:
  _, _, N, D = key.shape
  return GroupTile.for_groups(rows, query.shape[2] // N, D, elements)


def _add_gradients(
  query: Array,
  key: Array,
  value: Array,
  indices: Indices,
  dquery: Array,
  d: Entries,
  static: _Static,
) -> tuple[Array, Array, Array]:
  """Gradients of query, key and value. Each token is focal, or a member, or neither."""
  focal_index, member_index, group_query = indices
  L = key.shape[1]
  group_tile = _group_tile(query, key, member_index.shape[-1], _BACKWARD)
  row, last = group_tile.indices(member_index, group_query, L)
  focal_index = pad_index(focal_index, 2, ROWS, L)
  num_groups, num_focal = row.shape[2] * group_tile.groups, focal_index.shape[2]
  window = (d.window_key, d.window_value)
  onto = (jnp.zeros_like(key), jnp.zeros_like(value)) if static.reorder else window
  dquery, dkey, dvalue = merge_rows_grad(
    (query, key, value),
    row,
    last,
    (_at_least(d.group_key, num_groups), _at_least(d.group_value, num_groups)),
    window if static.reorder else None,
    (dquery, *onto),
    group_tile=group_tile,
    scale=static.scale,
    heads=static.heads,
    interpret=static.interpret,
  )
  dkey, dvalue = scatter_rows(
    (_at_least(d.focal_key, num_focal), _at_least(d.focal_value, num_focal)),
    (dkey, dvalue),
    focal_index,
    first_head=static.heads.first,
    add=not static.reorder,
    interpret=static.interpret,
  )
  return dquery, dkey, dvalue


def _at_least(x_BxSxNxD: Array, rows: int) -> Array:
  """Pads with rows of zeros to the whole tiles of the backward pass."""
  short = max(0, rows - x_BxSxNxD.shape[1])
  return jnp.pad(x_BxSxNxD, ((0, 0), (0, short), (0, 0), (0, 0))) if short else x_BxSxNxD
