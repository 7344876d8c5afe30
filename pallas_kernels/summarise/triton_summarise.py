"""Summarise through Pallas-Triton: what the kernels can do, index arrays, and the gradients.

The query is passed through, and under streaming selection key and value too, as the window: so
the backward pass is handed all other gradients of these arrays and adds its own in place, where
summing them outside would read and write the whole arrays again.
"""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.summarise.entries import block_indices, Entries
from pallas_kernels.summarise.triton_merge import GroupTile, merge_rows
from pallas_kernels.summarise.triton_merge_grad import merge_rows_grad
from pallas_kernels.summarise.triton_rows import gather_rows, pad_index, ROWS, scatter_rows

# Raised while lowering, thus long after any function here has returned.
warnings.filterwarnings(
  "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
)

_MOST_ROWS = 128  # of a group: more do not fit the registers


def refusal(query: Array, key: Array, rows: int) -> str | None:
  """Why the kernels cannot compute a call with groups or blocks of `rows` rows."""
  D = query.shape[-1]
  if D < 16 or D > 256 or D & (D - 1):
    return f"head_dim is {D}; these kernels want a power of two from 16 to 256"
  if query.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
    return f"dtype is {query.dtype}; these kernels have float16, bfloat16 and float32"
  if rows > _MOST_ROWS:
    return f"a group or block has {rows} tokens; these kernels take {_MOST_ROWS}"
  if 0 in key.shape:
    return "an array is empty"
  return None


@dataclasses.dataclass(frozen=True)
class _Static:
  scale: float
  reorder: bool = False
  members: int = 0
  focal: int = 0
  interpret: bool = False


def summarise_triton(
  query: Array,
  key: Array,
  value: Array,
  focal_index: Array,
  member_index: Array,
  group_query: Array,
  *,
  scale: float,
  reorder_window: bool,
  interpret: bool = False,
) -> tuple[Array, Entries]:
  """See `summarise`."""
  static = _Static(scale, reorder=reorder_window, interpret=interpret)
  return _summarise(query, key, value, (focal_index, member_index, group_query), static)


def summarise_blocks_triton(
  query: Array,
  key: Array,
  value: Array,
  start: Array,
  *,
  members: int,
  focal: int,
  scale: float,
  interpret: bool = False,
) -> tuple[Array, Entries, Array]:
  """See `summarise_blocks`."""
  static = _Static(scale, members=members, focal=focal, interpret=interpret)
  query, entries, chosen = _summarise_blocks(query, key, value, start, static)
  return query, entries, chosen[:, :, : start.shape[1]]


Indices = tuple[Array, Array, Array]  # of focal tokens, members and group queries


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summarise(
  query: Array, key: Array, value: Array, indices: Indices, static: _Static
) -> tuple[Array, Entries]:
  return _summarise_fwd(query, key, value, indices, static)[0]


def _summarise_fwd(
  query: Array, key: Array, value: Array, indices: Indices, static: _Static
) -> tuple[tuple[Array, Entries], tuple]:
  focal_index, member_index, group_query = indices
  L, m = key.shape[1], member_index.shape[-1]
  focal = gather_rows(key, value, pad_index(focal_index, 2, ROWS, L), interpret=static.interpret)
  group_tile, row, last = _group_rows(member_index, group_query, key)
  group_key, group_value, *window = merge_rows(
    query,
    key,
    value,
    row,
    last,
    rows=m,
    focal=0,
    scale=static.scale,
    reorder=static.reorder,
    group_tile=group_tile,
    interpret=static.interpret,
  )
  entries = Entries(*focal, group_key, group_value, *(window or (key, value)))
  return (query, entries), (query, key, value, indices)


def _summarise_bwd(static: _Static, residuals: tuple, cotangents: tuple) -> tuple:
  query, key, value, indices = residuals
  dquery, d = cotangents
  return *_add_gradients(query, key, value, indices, dquery, d, static), None


_summarise.defvjp(_summarise_fwd, _summarise_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summarise_blocks(
  query: Array, key: Array, value: Array, start: Array, static: _Static
) -> tuple[Array, Entries, Array]:
  return _summarise_blocks_fwd(query, key, value, start, static)[0]


def _summarise_blocks_fwd(
  query: Array, key: Array, value: Array, start: Array, static: _Static
) -> tuple[tuple[Array, Entries, Array], tuple]:
  L, size = key.shape[1], static.members + static.focal
  group_tile = GroupTile.of(size, key.shape[-1])
  start_Bxk = pad_index(start, 1, group_tile.multiple, L)
  lane_P = jnp.arange(group_tile.lanes, dtype=jnp.int32)[None, None]
  exists = (lane_P < size) & (start_Bxk[..., None] < L)
  row_BxkxP = jnp.where(exists, start_Bxk[..., None] + lane_P, L)
  group_key, group_value, focal_key, focal_value, chosen = merge_rows(
    query,
    key,
    value,
    row_BxkxP[:, None],
    row_BxkxP[:, None, :, size - 1],
    rows=size,
    focal=static.focal,
    scale=static.scale,
    reorder=False,
    group_tile=group_tile,
    interpret=static.interpret,
  )
  entries = Entries(focal_key, focal_value, group_key, group_value, key, value)
  return (query, entries, chosen), (query, key, value, start_Bxk, chosen)


def _summarise_blocks_bwd(static: _Static, residuals: tuple, cotangents: tuple) -> tuple:
  query, key, value, start_Bxk, chosen = residuals
  dquery, d, _ = cotangents
  indices = block_indices(start_Bxk, chosen, static.members, key.shape[1])
  return *_add_gradients(query, key, value, indices, dquery, d, static), None


_summarise_blocks.defvjp(_summarise_blocks_fwd, _summarise_blocks_bwd)


def _group_rows(
  member_index: Array, group_query: Array, key: Array
) -> tuple[GroupTile, Array, Array]:
  """Index arrays padded to the tiles of the kernels."""
  L, D = key.shape[1], key.shape[-1]
  group_tile = GroupTile.of(member_index.shape[-1], D)
  row = pad_index(member_index, 3, group_tile.lanes, L)
  row = pad_index(row, 2, group_tile.multiple, L)
  return group_tile, row, pad_index(group_query, 2, group_tile.multiple, L)


def _add_gradients(
  query: Array,
  key: Array,
  value: Array,
  indices: Indices,
  dquery: Array,
  d: Entries,
  static: _Static,
) -> tuple[Array, Array, Array]:
  """Gradients of query, key and value: every token is focal, or a member, or neither."""
  focal_index, member_index, group_query = indices
  L = key.shape[1]
  group_tile, row, last = _group_rows(member_index, group_query, key)
  window = (d.window_key, d.window_value)
  onto = (jnp.zeros_like(key), jnp.zeros_like(value)) if static.reorder else window
  dquery, dkey, dvalue = merge_rows_grad(
    (query, key, value),
    row,
    last,
    (d.group_key, d.group_value),
    window if static.reorder else None,
    (dquery, *onto),
    rows=member_index.shape[-1],
    scale=static.scale,
    group_tile=group_tile,
    interpret=static.interpret,
  )
  dkey, dvalue = scatter_rows(
    (d.focal_key, d.focal_value),
    (dkey, dvalue),
    pad_index(focal_index, 2, ROWS, L),
    add=not static.reorder,
    interpret=static.interpret,
  )
  return dquery, dkey, dvalue
