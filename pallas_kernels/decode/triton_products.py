"""Products of a few rows with large weights, and the elementwise work of a layer around them.

Decoding multiplies one row per sequence with every weight, so a product takes the time to read its
weight once, and a kernel launch beside it costs as much as megabytes of weights. These kernels
therefore include RMSNorm, RoPE, SwiGLU and the residual sum (Pallas-Triton, Ampere and newer).

A program computes a few output columns of all rows: it reads tiles of K rows of the weight and
accumulates in float32. The loop contains loads and products alone, so that the compiler keeps many
loads in flight. RMSNorm, y = x·s/√(mean x² + ε), scales every row of a product by one number: a
product takes x·s, and its programs multiply the result by that number (see `NormInput`).

Letters: M rows, rounded up; B of them exist. K rows of a tile of a weight. T columns of a tile.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode.products import NormInput
from pallas_kernels.decode.triton_tile import MIN_DOT_SIDE
from pallas_kernels.kernel_common import out_struct
from pallas_kernels.triton_common import dot, padded_slice


class ProductTile(NamedTuple):
  """The tile of a weight that a program multiplies at a time, and its launch parameters."""

  rows: int
  columns: int
  num_warps: int = 4
  num_stages: int = 4


# The fastest tiles on an H200 at LLaMA2-7B's shapes, one row, bfloat16. A product with one weight
# has few programs, and each of them needs many loads in flight.
_ADD = ProductTile(128, 32, num_stages=8)
_SWIGLU = ProductTile(128, 64, num_stages=3)
_QKV = ProductTile(128, 32, num_stages=4)


def _fitted(tile: ProductTile, weight: Array, columns: int) -> ProductTile:
  """The tile with divisors of the weight's rows and of `columns`, in as much memory."""
  rows = tile.rows * 2 // weight.dtype.itemsize
  return tile._replace(
    rows=_divisor(weight.shape[0], rows), columns=_divisor(columns, tile.columns)
  )


def _divisor(size: int, most: int) -> int:
  """The largest power of two up to `most` that divides the size."""
  return min(most, size & -size)


def add_product_triton(
  x_BxE: Array,
  y_BxF: Array,
  weight_FxE: Array,
  scale_E: Array,
  *,
  tile: ProductTile | None = None,
  interpret: bool = False,
) -> tuple[Array, NormInput]:
  """See `pallas_kernels.decode.products.add_product`."""
  (B, E), F = x_BxE.shape, y_BxF.shape[1]
  tile = tile or _fitted(_ADD, weight_FxE, E)
  T, programs = tile.columns, E // tile.columns
  columns = pl.BlockSpec((B, T), lambda t: (0, t))
  like_x = out_struct(x_BxE, (B, E), x_BxE.dtype)
  x_BxE, scaled_BxE, squares = pl.pallas_call(
    functools.partial(_add_kernel, tile=tile),
    grid=(programs,),
    in_specs=[
      columns,
      _whole(y_BxF),
      pl.BlockSpec((F, T), lambda t: (0, t)),
      pl.BlockSpec((T,), lambda t: (t,)),
    ],
    out_specs=[columns, columns, pl.BlockSpec((None, B), lambda t: (t, 0))],
    out_shape=[like_x, like_x, out_struct(x_BxE, (programs, B), jnp.float32)],
    compiler_params=_launch(tile),
    interpret=interpret,
    name="decode_add_product",
  )(x_BxE, y_BxF, weight_FxE, scale_E)
  return x_BxE, NormInput(scaled_BxE, squares)


def _add_kernel(
  x_ref: Any,
  y_ref: Any,
  weight_ref: Any,
  scale_ref: Any,
  out_ref: Any,
  scaled_ref: Any,
  squares_ref: Any,
  *,
  tile: ProductTile,
) -> None:
  (product_MxT,) = _products(y_ref, [weight_ref], [0], tile.rows, tile.columns)
  rows, exists_M = _rows(x_ref.shape[0])
  mask = jnp.broadcast_to(exists_M[:, None], product_MxT.shape)
  x_MxT = plgpu.load(x_ref.at[rows, :], mask=mask, other=0.0)
  out_MxT = (x_MxT.astype(jnp.float32) + product_MxT).astype(out_ref.dtype)
  wide_MxT = out_MxT.astype(jnp.float32)
  scaled_MxT = wide_MxT * scale_ref[...].astype(jnp.float32)[None]
  plgpu.store(out_ref.at[rows, :], out_MxT, mask=mask)
  plgpu.store(scaled_ref.at[rows, :], scaled_MxT.astype(out_ref.dtype), mask=mask)
  plgpu.store(squares_ref.at[rows], (wide_MxT * wide_MxT).sum(axis=1), mask=exists_M)


def normed_swiglu_triton(
  x: NormInput,
  gate_ExF: Array,
  up_ExF: Array,
  *,
  epsilon: float,
  tile: ProductTile | None = None,
  interpret: bool = False,
) -> Array:
  """See `pallas_kernels.decode.products.normed_swiglu`."""
  (B, E), F = x.scaled.shape, gate_ExF.shape[1]
  tile = tile or _fitted(_SWIGLU, gate_ExF, F)
  weight = pl.BlockSpec((E, tile.columns), lambda t: (0, t))
  out: Array = pl.pallas_call(
    functools.partial(_swiglu_kernel, epsilon=epsilon, tile=tile),
    grid=(F // tile.columns,),
    in_specs=[jax.tree.map(_whole, x), weight, weight],
    out_specs=pl.BlockSpec((B, tile.columns), lambda t: (0, t)),
    out_shape=out_struct(x.scaled, (B, F), x.scaled.dtype),
    compiler_params=_launch(tile),
    interpret=interpret,
    name="decode_normed_swiglu",
  )(x, gate_ExF, up_ExF)
  return out


def _swiglu_kernel(
  x_ref: NormInput, gate_ref: Any, up_ref: Any, out_ref: Any, *, epsilon: float, tile: ProductTile
) -> None:
  inverse_Mx1 = _inverse_norm(x_ref, epsilon)
  products = _products(x_ref.scaled, [gate_ref, up_ref], [0, 0], tile.rows, tile.columns)
  gate_MxT, up_MxT = (x_MxT * inverse_Mx1 for x_MxT in products)
  out_MxT = gate_MxT * up_MxT / (1 + jnp.exp(-gate_MxT))
  rows, exists_M = _rows(out_ref.shape[0])
  mask = jnp.broadcast_to(exists_M[:, None], out_MxT.shape)
  plgpu.store(out_ref.at[rows, :], out_MxT.astype(out_ref.dtype), mask=mask)


def normed_qkv_triton(
  x: NormInput,
  query_ExHD: Array,
  key_ExND: Array,
  value_ExND: Array,
  cos_BxC: Array,
  sin_BxC: Array,
  *,
  epsilon: float,
  tile: ProductTile | None = None,
  interpret: bool = False,
) -> tuple[Array, Array, Array]:
  """See `pallas_kernels.decode.products.normed_qkv`.

  A program computes as many channels of the first half of a head as of the second.
  """
  B, C = x.scaled.shape[0], cos_BxC.shape[1]
  tile = tile or _fitted(_QKV, query_ExHD, C)
  weights = (query_ExHD, key_ExND, value_ExND)
  widths = [weight.shape[1] for weight in weights]
  programs = [width // (2 * tile.columns) for width in widths]
  outs = [out_struct(x.scaled, (B, width), x.scaled.dtype) for width in widths]
  query, key, value = pl.pallas_call(
    functools.partial(_qkv_kernel, programs=programs, epsilon=epsilon, tile=tile),
    grid=(sum(programs),),
    in_specs=jax.tree.map(_whole, [x, cos_BxC, sin_BxC, list(weights)]),
    out_specs=[_whole(out) for out in outs],
    out_shape=outs,
    compiler_params=_launch(tile),
    interpret=interpret,
    name="decode_normed_qkv",
  )(x, cos_BxC, sin_BxC, list(weights))
  return query, key, value


def _qkv_kernel(
  x_ref: NormInput,
  cos_ref: Any,
  sin_ref: Any,
  weight_refs: list[Any],
  *out_refs: Any,
  programs: list[int],
  epsilon: float,
  tile: ProductTile,
) -> None:
  T, C, own = tile.columns, cos_ref.shape[1], pl.program_id(0)
  rows, exists_M = _rows(x_ref.scaled.shape[0])
  mask = jnp.broadcast_to(exists_M[:, None], (exists_M.shape[0], T))
  inverse_Mx1 = _inverse_norm(x_ref, epsilon)

  def project(weight_ref: Any, out_ref: Any, program: Array, rotates: bool) -> None:
    channel = lax.rem(program, C // T) * T
    column = lax.div(program, C // T) * (2 * C) + channel
    columns = [column, column + C]
    products = _products(x_ref.scaled, [weight_ref, weight_ref], columns, tile.rows, T)
    first_MxT, second_MxT = (x_MxT * inverse_Mx1 for x_MxT in products)
    if rotates:
      at = (rows, padded_slice(channel, T))
      cos, sin = (plgpu.load(ref.at[at], mask=mask, other=0.0) for ref in (cos_ref, sin_ref))
      turned_MxT = second_MxT * cos + first_MxT * sin
      first_MxT, second_MxT = first_MxT * cos - second_MxT * sin, turned_MxT
    for start, out_MxT in zip(columns, (first_MxT, second_MxT), strict=True):
      part = out_ref.at[rows, padded_slice(start, T)]
      plgpu.store(part, out_MxT.astype(out_ref.dtype), mask=mask)

  begin = 0
  for index, count in enumerate(programs):
    is_own = (own >= begin) & (own < begin + count)
    arguments = (weight_refs[index], out_refs[index], own - begin, index < 2)
    pl.when(is_own)(functools.partial(project, *arguments))
    begin += count


def _products(
  x_ref: Any, weight_refs: list[Any], columns: Sequence[Array | int], K: int, T: int
) -> list[Array]:
  """x times T columns of some weights, from the given ones on: [M, T] each."""
  B, E = x_ref.shape
  rows, exists_M = _rows(B)
  mask = jnp.broadcast_to(exists_M[:, None], (exists_M.shape[0], K))

  def step(k: Array, sums: list[Array]) -> list[Array]:
    at = padded_slice(k * K, K)
    x_MxK = plgpu.load(x_ref.at[rows, at], mask=mask, other=0.0)
    return [
      total + dot(x_MxK, plgpu.load(ref.at[at, padded_slice(column, T)]))
      for total, ref, column in zip(sums, weight_refs, columns, strict=True)
    ]

  zeros = [jnp.zeros((exists_M.shape[0], T), jnp.float32) for _ in weight_refs]
  sums: list[Array] = lax.fori_loop(0, E // K, step, zeros)
  return sums


def _inverse_norm(x_ref: NormInput, epsilon: float) -> Array:
  """1/√(mean x² + ε) of each row, [M, 1]."""
  squares_ref: Any = x_ref.squares
  (parts, B), E = squares_ref.shape, x_ref.scaled.shape[1]
  rows, exists_M = _rows(B)
  P = pl.next_power_of_2(parts)
  mask = (jnp.arange(P) < parts)[:, None] & exists_M[None]
  squares_PxM = plgpu.load(squares_ref.at[padded_slice(0, P), rows], mask=mask, other=0.0)
  return lax.rsqrt(squares_PxM.sum(axis=0) / E + epsilon)[:, None]


def _rows(count: int) -> tuple[pl.Slice, Array]:
  """All rows, rounded up to what a product needs, and which of them exist [M]."""
  M = max(MIN_DOT_SIDE, pl.next_power_of_2(count))
  return padded_slice(0, M), jnp.arange(M) < count


def _whole(x: Any) -> pl.BlockSpec:
  return pl.BlockSpec(x.shape, lambda t: (0,) * len(x.shape))


def _launch(tile: ProductTile) -> plgpu.CompilerParams:
  return plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages)
