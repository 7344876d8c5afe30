"""Products of a few rows with large weights, and the elementwise work of a layer around them.

Decoding multiplies one row per sequence with every weight, so a product takes the time to read its
weight once, and a kernel launch beside it costs as much as megabytes of weights. These kernels
therefore include RMSNorm, RoPE, SwiGLU and the residual sum (Pallas-Triton, Ampere and newer).

A program computes a few output columns of all rows: it reads tiles of K rows of the weight and
accumulates in float32. RMSNorm, y = x·s/√(mean x² + ε), scales every row of a product by one
number, so a program multiplies x·s with the weight, sums x² in the same loop, and divides at the
end.

Letters: M rows, rounded up; B of them exist. K rows of a tile of a weight. T columns of a tile.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode.triton_tile import load_rows, MIN_DOT_SIDE
from pallas_kernels.kernel_common import out_struct
from pallas_kernels.triton_common import dot, padded_slice


class ProductTile(NamedTuple):
  """The tile of a weight that a program multiplies at a time, and its launch parameters."""

  rows: int
  columns: int
  num_warps: int = 4
  num_stages: int = 4


def default_tile(rows: int, columns: int) -> ProductTile:
  """The tile for a weight [rows, columns]: divisors of its sizes."""
  return ProductTile(_divisor(rows, 128), _divisor(columns, 32))


def _divisor(size: int, most: int) -> int:
  """The largest power of two up to `most` that divides the size."""
  return min(most, size & -size)


def add_product_triton(
  x_BxE: Array,
  y_BxF: Array,
  weight_FxE: Array,
  *,
  tile: ProductTile | None = None,
  interpret: bool = False,
) -> Array:
  """See `pallas_kernels.decode.products.add_product`."""
  tile = tile or default_tile(y_BxF.shape[1], weight_FxE.shape[1])

  def kernel(x_ref: Any, y_ref: Any, weight_ref: Any, out_ref: Any) -> None:
    (product_MxT,), _ = _products(y_ref, None, [weight_ref], [0], tile)
    rows, exists_Mx1 = _rows(out_ref.shape[0])
    x_MxT = load_rows(x_ref, (), 0, product_MxT.shape[0], x_ref.shape[0])
    out_MxT = (x_MxT.astype(jnp.float32) + product_MxT).astype(out_ref.dtype)
    plgpu.store(out_ref.at[rows, :], out_MxT, mask=jnp.broadcast_to(exists_Mx1, out_MxT.shape))

  B, E = x_BxE.shape
  columns = pl.BlockSpec((B, tile.columns), lambda t: (0, t))
  out: Array = pl.pallas_call(
    kernel,
    grid=(pl.cdiv(E, tile.columns),),
    in_specs=[
      columns,
      pl.BlockSpec(y_BxF.shape, lambda t: (0, 0)),
      pl.BlockSpec((weight_FxE.shape[0], tile.columns), lambda t: (0, t)),
    ],
    out_specs=columns,
    out_shape=out_struct(x_BxE, x_BxE.shape, x_BxE.dtype),
    compiler_params=_launch(tile),
    interpret=interpret,
    name="decode_add_product",
  )(x_BxE, y_BxF, weight_FxE)
  return out


def normed_swiglu_triton(
  x_BxE: Array,
  scale_E: Array,
  gate_ExF: Array,
  up_ExF: Array,
  *,
  epsilon: float,
  tile: ProductTile | None = None,
  interpret: bool = False,
) -> Array:
  """See `pallas_kernels.decode.products.normed_swiglu`."""
  tile = tile or default_tile(*gate_ExF.shape)

  def kernel(x_ref: Any, scale_ref: Any, gate_ref: Any, up_ref: Any, out_ref: Any) -> None:
    weights, first = [gate_ref, up_ref], [0, 0]
    (gate_MxT, up_MxT), squares_M = _products(x_ref, scale_ref, weights, first, tile)
    inverse_Mx1 = _inverse_norm(squares_M, x_ref.shape[1], epsilon)
    gate_MxT = gate_MxT * inverse_Mx1
    out_MxT = gate_MxT * (up_MxT * inverse_Mx1) / (1 + jnp.exp(-gate_MxT))
    rows, exists_Mx1 = _rows(out_ref.shape[0])
    mask = jnp.broadcast_to(exists_Mx1, out_MxT.shape)
    plgpu.store(out_ref.at[rows, :], out_MxT.astype(out_ref.dtype), mask=mask)

  (B, E), F = x_BxE.shape, gate_ExF.shape[1]
  weight = pl.BlockSpec((E, tile.columns), lambda t: (0, t))
  out: Array = pl.pallas_call(
    kernel,
    grid=(pl.cdiv(F, tile.columns),),
    in_specs=[
      pl.BlockSpec((B, E), lambda t: (0, 0)),
      pl.BlockSpec((E,), lambda t: (0,)),
      weight,
      weight,
    ],
    out_specs=pl.BlockSpec((B, tile.columns), lambda t: (0, t)),
    out_shape=out_struct(x_BxE, (B, F), x_BxE.dtype),
    compiler_params=_launch(tile),
    interpret=interpret,
    name="decode_normed_swiglu",
  )(x_BxE, scale_E, gate_ExF, up_ExF)
  return out


def normed_qkv_triton(
  x_BxE: Array,
  scale_E: Array,
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

  Half of a tile's columns are of the first half of a head's channels, half of the second.
  """
  B, C = x_BxE.shape[0], cos_BxC.shape[1]
  tile = tile or default_tile(x_BxE.shape[1], C)
  half = tile.columns // 2
  weights = (query_ExHD, key_ExND, value_ExND)
  programs = [weight.shape[1] // tile.columns for weight in weights]
  whole = functools.partial(_whole, axes=1)
  outs = [out_struct(x_BxE, (B, weight.shape[1]), x_BxE.dtype) for weight in weights]
  kernel = functools.partial(
    _qkv_kernel, programs=programs, per_head=C // half, epsilon=epsilon, tile=tile
  )
  query, key, value = pl.pallas_call(
    kernel,
    grid=(sum(programs),),
    in_specs=[whole(x) for x in (x_BxE, scale_E, cos_BxC, sin_BxC, *weights)],
    out_specs=[whole(x) for x in outs],
    out_shape=outs,
    compiler_params=_launch(tile),
    interpret=interpret,
    name="decode_normed_qkv",
  )(x_BxE, scale_E, cos_BxC, sin_BxC, *weights)
  return query, key, value


def _qkv_kernel(
  x_ref: Any,
  scale_ref: Any,
  cos_ref: Any,
  sin_ref: Any,
  *refs: Any,
  programs: list[int],
  per_head: int,
  epsilon: float,
  tile: ProductTile,
) -> None:
  B, half, C = x_ref.shape[0], tile.columns // 2, cos_ref.shape[1]
  rows, exists_Mx1 = _rows(B)
  begin, own = 0, pl.program_id(0)
  for index, (count, weight_ref, out_ref) in enumerate(
    zip(programs, refs[:3], refs[3:], strict=True)
  ):

    def project(
      begin: int = begin, index: int = index, weight_ref: Any = weight_ref, out_ref: Any = out_ref
    ) -> None:
      program = own - begin
      channel = lax.rem(program, per_head) * half
      column = lax.div(program, per_head) * (2 * C) + channel
      (first_MxT, second_MxT), squares_M = _products(
        x_ref, scale_ref, [weight_ref, weight_ref], [column, column + C], tile, half
      )
      inverse_Mx1 = _inverse_norm(squares_M, x_ref.shape[1], epsilon)
      first_MxT, second_MxT = first_MxT * inverse_Mx1, second_MxT * inverse_Mx1
      mask = jnp.broadcast_to(exists_Mx1, first_MxT.shape)
      if index < 2:
        at = (rows, padded_slice(channel, half))
        cos_MxT, sin_MxT = (
          plgpu.load(ref.at[at], mask=mask, other=0.0) for ref in (cos_ref, sin_ref)
        )
        first_MxT, second_MxT = (
          first_MxT * cos_MxT - second_MxT * sin_MxT,
          second_MxT * cos_MxT + first_MxT * sin_MxT,
        )
      for start, out_MxT in ((column, first_MxT), (column + C, second_MxT)):
        part = out_ref.at[rows, padded_slice(start, half)]
        plgpu.store(part, out_MxT.astype(out_ref.dtype), mask=mask)

    is_own = (own >= begin) & (own < begin + count)
    pl.when(is_own)(project)
    begin += count


def _products(
  x_ref: Any,
  scale_ref: Any,
  weight_refs: list[Any],
  first_columns: Sequence[Array | int],
  tile: ProductTile,
  columns: int | None = None,
) -> tuple[list[Array], Array]:
  """x·s times tiles of columns of some weights, [M, T] each, and the sums of x², [M]."""
  B, E = x_ref.shape
  T = columns or tile.columns
  rows, exists_Mx1 = _rows(B)
  M = exists_Mx1.shape[0]

  def step(k: Array, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
    sums, squares_M = carry
    at = padded_slice(k * tile.rows, tile.rows)
    x_MxK = plgpu.load(
      x_ref.at[rows, at], mask=jnp.broadcast_to(exists_Mx1, (M, tile.rows)), other=0.0
    )
    if scale_ref is not None:
      wide_MxK = x_MxK.astype(jnp.float32)
      squares_M += (wide_MxK * wide_MxK).sum(axis=1)
      scale_K = plgpu.load(scale_ref.at[at]).astype(jnp.float32)
      x_MxK = (wide_MxK * scale_K[None]).astype(x_MxK.dtype)
    sums = [
      total + dot(x_MxK, plgpu.load(ref.at[at, padded_slice(column, T)]))
      for total, ref, column in zip(sums, weight_refs, first_columns, strict=True)
    ]
    return sums, squares_M

  zeros = [jnp.zeros((M, T), jnp.float32) for _ in weight_refs]
  return lax.fori_loop(0, E // tile.rows, step, (zeros, jnp.zeros((M,), jnp.float32)))


def _inverse_norm(squares_M: Array, size: int, epsilon: float) -> Array:
  return lax.rsqrt(squares_M / size + epsilon)[:, None]


def _rows(count: int) -> tuple[pl.Slice, Array]:
  """All rows, rounded up to what a product needs, and which of them exist [M, 1]."""
  M = max(MIN_DOT_SIDE, pl.next_power_of_2(count))
  return padded_slice(0, M), (jnp.arange(M) < count)[:, None]


def _whole(x: Any, axes: int) -> pl.BlockSpec:
  return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))


def _launch(tile: ProductTile) -> plgpu.CompilerParams:
  return plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages)
