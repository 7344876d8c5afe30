"""Gather and scatter of rows by index through Pallas-Triton: loads, stores and two kernels."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.kernel_common import out_struct

ROWS = 64  # of a tile of the gather and scatter kernels


def whole(x: Array, heads: int | None, first: int) -> pl.BlockSpec:
  """All rows of one head of [B, L, N, D], or of `heads` of them, for a grid of (tile, n, B).

  Entry 0 of the grid's heads is KV head `first` of the array.
  """
  return pl.BlockSpec((None, x.shape[1], heads, x.shape[3]), lambda t, n, b: (b, 0, n + first, 0))


def tile(rows: int, head_dim: int) -> pl.BlockSpec:
  """A tile of `rows` rows of one head of [B, S, N, D]."""
  return pl.BlockSpec((None, rows, None, head_dim), lambda t, n, b: (b, t, n, 0))


def per_tile(index: Array) -> pl.BlockSpec:
  """A tile's part of an index array [B, n, tiles, size]; n is N or 1."""
  shared = index.shape[1] == 1
  return pl.BlockSpec(
    (None, None, None, index.shape[3]), lambda t, n, b: (b, 0 if shared else n, t, 0)
  )


def load_indexed_rows(ref: Any, index_T: Array, *head_T: Array, length: int) -> Array:
  """[T, D] rows of a reference [L, D], or of [L, R, D] and a head each; zeros from `length` on."""
  at, mask_TxD = _rows_at(ref, index_T, head_T, length)
  return plgpu.load(at, mask=mask_TxD, other=0)


def store_indexed_rows(ref: Any, index_T: Array, x_TxD: Array, *head_T: Array, length: int) -> None:
  """The inverse of `load_indexed_rows`; a row whose index is `length` or more is not stored."""
  at, mask_TxD = _rows_at(ref, index_T, head_T, length)
  plgpu.store(at, x_TxD.astype(ref.dtype), mask=mask_TxD)


def _rows_at(ref: Any, index_T: Array, head_T: tuple[Array, ...], length: int) -> tuple[Any, Array]:
  """One pointer for each element of the rows, and which elements exist."""
  shape = (*index_T.shape, ref.shape[-1])
  index = [jnp.broadcast_to(i_T[:, None], shape) for i_T in (index_T, *head_T)]
  column_TxD = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
  return ref.at[(*index, column_TxD)], index[0] < length


def gather_rows(
  key: Array, value: Array, index_BxNxS: Array, *, first_head: int, interpret: bool
) -> tuple[Array, Array]:
  """Rows of key and value [B, L, heads, D] by each head's index; S is a multiple of ROWS.

  The first index is for head `first_head`. The results have N heads.
  """
  B, L, _, D = key.shape
  N, S = index_BxNxS.shape[1:]
  out = out_struct(key, (B, S, N, D), key.dtype)
  gathered: tuple[Array, Array] = pl.pallas_call(
    functools.partial(_gather_kernel, length=L),
    grid=(S // ROWS, N, B),
    in_specs=[whole(key, None, first_head), whole(value, None, first_head), _index_spec()],
    out_specs=[tile(ROWS, D), tile(ROWS, D)],
    out_shape=[out, out],
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="group_merge_gather",
  )(key, value, index_BxNxS)
  return gathered


def _gather_kernel(
  key_ref: Any, value_ref: Any, index_ref: Any, key_out_ref: Any, value_out_ref: Any, *, length: int
) -> None:
  index_T = index_ref[...]
  for ref, out_ref in ((key_ref, key_out_ref), (value_ref, value_out_ref)):
    out_ref[...] = load_indexed_rows(ref, index_T, length=length)


def scatter_rows(
  rows: tuple[Array, Array],
  onto: tuple[Array, Array],
  index_BxNxS: Array,
  *,
  first_head: int,
  add: bool,
  interpret: bool,
) -> tuple[Array, Array]:
  """Writes rows [B, S, N, D] to two arrays [B, L, heads, D] in place, or adds them.

  No index occurs twice; S is a multiple of ROWS, and `rows` may hold more. The first index is for
  head `first_head`.
  """
  L, D = onto[0].shape[1], onto[0].shape[3]
  B, N, S = index_BxNxS.shape
  specs = [whole(onto[0], None, first_head), whole(onto[1], None, first_head)]
  scattered: tuple[Array, Array] = pl.pallas_call(
    functools.partial(_scatter_kernel, length=L, add=add),
    grid=(S // ROWS, N, B),
    in_specs=[tile(ROWS, D), tile(ROWS, D), _index_spec(), *specs],
    out_specs=specs,
    out_shape=[out_struct(x, x.shape, x.dtype) for x in onto],
    input_output_aliases={3: 0, 4: 1},
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="group_merge_scatter",
  )(*rows, index_BxNxS, *onto)
  return scattered


def _scatter_kernel(
  row_key_ref: Any,
  row_value_ref: Any,
  index_ref: Any,
  key_ref: Any,
  value_ref: Any,
  key_out_ref: Any,
  value_out_ref: Any,
  *,
  length: int,
  add: bool,
) -> None:
  index_T = index_ref[...]
  for rows_ref, ref, out_ref in (
    (row_key_ref, key_ref, key_out_ref),
    (row_value_ref, value_ref, value_out_ref),
  ):
    x_TxD = rows_ref[...].astype(jnp.float32)
    if add:
      x_TxD += load_indexed_rows(ref, index_T, length=length).astype(jnp.float32)
    store_indexed_rows(out_ref, index_T, x_TxD, length=length)


def _index_spec() -> pl.BlockSpec:
  return pl.BlockSpec((None, None, ROWS), lambda t, n, b: (b, n, t))
