"""The product of a few rows with a weight in 8 bits, lowered through Pallas-Triton.

A program computes a few output channels of all rows as a matrix product. It reads the numbers of
these channels once, in 8 bits, and converts them in registers.

Letters: B rows, M of them with padding. T output channels of a program. K inputs of a tile.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode.triton_tile import MIN_DOT_SIDE
from pallas_kernels.kernel_common import out_struct
from pallas_kernels.rms_norm.equation import rms_norm_xla
from pallas_kernels.triton_common import dot, padded_slice


class Tile(NamedTuple):
  """The tile of a weight that a program reads at a time, and its launch parameters.

  The default is the fastest tile on an H200 at LLaMA2-7B's shapes, for 1 to 16 rows.
  """

  channels: int = 32
  inputs: int = 256
  num_warps: int = 4
  num_stages: int = 4


class _Operands(NamedTuple):
  """The operands of a kernel: arrays, their block specs, or references.

  Numbers and scales are those of the product, or those of gate and up.
  """

  x: Any
  numbers: list[Any]
  scales: list[Any]
  residual: Any


def quantized_product_triton(
  x_BxK: Array,
  numbers_TxK: Array,
  scale_T: Array,
  *,
  norm_scale: Array | None,
  epsilon: float,
  swiglu: bool,
  residual: Array | None,
  tile: Tile | None = None,
  interpret: bool = False,
) -> Array:
  """See `quantized_product`."""
  dtype = x_BxK.dtype
  if norm_scale is not None:
    # In the loop over the inputs, the norm would delay the loads of the weight.
    _, x_BxK = rms_norm_xla(x_BxK, norm_scale, epsilon=epsilon)
    x_BxK = _in_operand_dtype(x_BxK, numbers_TxK)
  parts = range(2 if swiglu else 1)
  B, inputs = x_BxK.shape
  channels = numbers_TxK.shape[0] // len(parts)
  tile = _fitted(tile or Tile(), channels, inputs)
  T, programs = tile.channels, channels // tile.channels

  def channel_block(part: int, *width: int) -> pl.BlockSpec:
    return pl.BlockSpec((T, *width), lambda t: (t + part * programs, *[0] * len(width)))

  out_block = pl.BlockSpec((B, T), lambda t: (0, t))
  operands = _Operands(x_BxK, [numbers_TxK for _ in parts], [scale_T for _ in parts], residual)
  specs = _Operands(
    pl.BlockSpec(x_BxK.shape, lambda t: (0, 0)),
    [channel_block(part, inputs) for part in parts],
    [channel_block(part) for part in parts],
    None if residual is None else out_block,
  )
  out: Array = pl.pallas_call(
    functools.partial(_kernel, tile=tile),
    grid=(programs,),
    in_specs=[specs],
    out_specs=out_block,
    out_shape=out_struct(x_BxK, (B, channels), dtype),
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name="quantized_product",
  )(operands)
  return out


def _in_operand_dtype(normed_BxK: Array, numbers_TxK: Array) -> Array:
  """Normalised rows in the dtype to which the kernel converts the numbers.

  A GPU converts two numbers of float8_e4m3fn to float16 in one instruction, and to bfloat16 through
  float32: on an H200 the products of gate and up take 24.8 instead of 42.7 µs. With int8, bfloat16
  is faster (25.4 µs, and 36.8 with float16). An element of a normalised row is at most √K times its
  scale: with K = 16384, float16 overflows to infinity only for scales above 500. Rows without a
  norm may be larger.
  """
  if normed_BxK.dtype == jnp.bfloat16 and numbers_TxK.dtype == jnp.float8_e4m3fn:
    return normed_BxK.astype(jnp.float16)
  return normed_BxK


def _fitted(tile: Tile, channels: int, inputs: int) -> Tile:
  """The tile with divisors of the channels and of the inputs."""
  return tile._replace(
    channels=min(tile.channels, channels & -channels), inputs=min(tile.inputs, inputs & -inputs)
  )


def _kernel(ref: _Operands, out_ref: Any, *, tile: Tile) -> None:
  (B, inputs), K, T = ref.x.shape, tile.inputs, tile.channels
  M = max(MIN_DOT_SIDE, pl.next_power_of_2(B))
  rows, exists_M = padded_slice(0, M), jnp.arange(M) < B
  mask_MxK = jnp.broadcast_to(exists_M[:, None], (M, K))

  def step(k: Array, sums: list[Array]) -> list[Array]:
    at = padded_slice(k * K, K)
    x_MxK = plgpu.load(ref.x.at[rows, at], mask=mask_MxK, other=0.0)
    return [
      total + dot(x_MxK, plgpu.load(numbers.at[:, at]).astype(x_MxK.dtype), trans_b=True)
      for total, numbers in zip(sums, ref.numbers, strict=True)
    ]

  zeros = [jnp.zeros((M, T), jnp.float32) for _ in ref.numbers]
  products = lax.fori_loop(0, inputs // K, step, zeros)
  products = [
    product * scale[...][None] for product, scale in zip(products, ref.scales, strict=True)
  ]
  out_MxT = products[0]
  if len(products) == 2:
    gate_MxT, up_MxT = products
    out_MxT = gate_MxT * up_MxT / (1 + jnp.exp(-gate_MxT))
  mask_MxT = jnp.broadcast_to(exists_M[:, None], (M, T))
  if ref.residual is not None:
    residual_MxT = plgpu.load(ref.residual.at[rows, :], mask=mask_MxT, other=0.0)
    out_MxT += residual_MxT.astype(jnp.float32)
  plgpu.store(out_ref.at[rows, :], out_MxT.astype(out_ref.dtype), mask=mask_MxT)
