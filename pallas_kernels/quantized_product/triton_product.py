"""The product of a few rows with a weight in 8 bits, lowered through Pallas-Triton.

A program computes a few output channels of all rows as a matrix product. It reads the numbers of
these channels once, as words of four, and makes floating-point numbers of them in registers. Byte
j of word c is input j·K/4 + c, so that the inputs of one byte are adjacent in the rows.

Letters: B rows, M of them with padding. T output channels of a program. C words of a tile.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode.triton_tile import MIN_DOT_SIDE
from pallas_kernels.kernel_common import out_struct
from pallas_kernels.quantized_product.xla import rms_norm
from pallas_kernels.triton_common import dot, padded_slice


class Tile(NamedTuple):
  """The tile of a weight that a program reads at a time, and its launch parameters.

  Attributes:
    channels: output channels of a program.
    words: of 4 inputs each.
    num_warps: of a program.
    num_stages: tiles in flight.
  """

  channels: int = 32
  words: int = 64
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
  numbers_TxCx4: Array,
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
  if norm_scale is not None:
    # In the loop over the inputs, the norm would delay the loads of the weight.
    x_BxK = rms_norm(x_BxK, norm_scale, epsilon)
  parts = range(2 if swiglu else 1)
  B, (rows, quarter, _) = x_BxK.shape[0], numbers_TxCx4.shape
  channels = rows // len(parts)
  tile = _fitted(tile or Tile(), channels, quarter)
  T, programs = tile.channels, channels // tile.channels
  words_TxC = lax.bitcast_convert_type(numbers_TxCx4, jnp.int32)

  def channel_block(part: int, *width: int) -> pl.BlockSpec:
    return pl.BlockSpec((T, *width), lambda t: (t + part * programs, *[0] * len(width)))

  out_block = pl.BlockSpec((B, T), lambda t: (0, t))
  operands = _Operands(x_BxK, [words_TxC for _ in parts], [scale_T for _ in parts], residual)
  specs = _Operands(
    pl.BlockSpec(x_BxK.shape, lambda t: (0, 0)),
    [channel_block(part, quarter) for part in parts],
    [channel_block(part) for part in parts],
    None if residual is None else out_block,
  )
  out: Array = pl.pallas_call(
    functools.partial(_kernel, tile=tile, stored=numbers_TxCx4.dtype.name),
    grid=(programs,),
    in_specs=[specs],
    out_specs=out_block,
    out_shape=out_struct(x_BxK, (B, channels), x_BxK.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name=f"quantized_product_{rows}x{4 * quarter}",
  )(operands)
  return out


def _fitted(tile: Tile, channels: int, words: int) -> Tile:
  """The tile with divisors of the channels and of the words of a channel."""
  return tile._replace(
    channels=min(tile.channels, channels & -channels), words=min(tile.words, words & -words)
  )


def _kernel(ref: _Operands, out_ref: Any, *, tile: Tile, stored: str) -> None:
  B, quarter, C, T = ref.x.shape[0], ref.numbers[0].shape[1], tile.words, tile.channels
  M = max(MIN_DOT_SIDE, pl.next_power_of_2(B))
  rows, exists_M = padded_slice(0, M), jnp.arange(M) < B
  mask_MxC = jnp.broadcast_to(exists_M[:, None], (M, C))

  def step(c: Array, sums: list[Array]) -> list[Array]:
    words = [plgpu.load(numbers.at[:, padded_slice(c * C, C)]) for numbers in ref.numbers]
    for byte in range(4):
      at = padded_slice(byte * quarter + c * C, C)
      x_MxC = plgpu.load(ref.x.at[rows, at], mask=mask_MxC, other=0.0)
      sums = [
        total
        + dot(x_MxC, number_in_word(words_TxC, byte, stored).astype(x_MxC.dtype), trans_b=True)
        for total, words_TxC in zip(sums, words, strict=True)
      ]
    return sums

  zeros = [jnp.zeros((M, T), jnp.float32) for _ in ref.numbers]
  products = lax.fori_loop(0, quarter // C, step, zeros)
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


def number_in_word(words: Array, byte: int, stored: str) -> Array:
  """The number in one byte of each word, in float32.

  Instructions that convert from 8 bits have a quarter of the rate of others, so the bits of a
  float32 or float16 are made from the byte.
  """
  if stored == "int8":
    # The byte plus 128 is the end of the fraction of 2²³ + 128 + number.
    flipped = words ^ jnp.int32(-0x7F7F7F80)
    bits = (lax.shift_right_logical(flipped, jnp.int32(8 * byte)) & 0xFF) | 0x4B000000
    return lax.bitcast_convert_type(bits, jnp.float32) - (2.0**23 + 128)
  # Sign, 4 bits of exponent and 3 of fraction move to their places in a float16, whose exponent
  # counts from 15 in place of 7.
  first = lax.shift_left(words, jnp.int32(24 - 8 * byte))
  high = lax.shift_right_arithmetic(first, jnp.int32(1)) & jnp.int32(-0x40800000)
  half = lax.shift_right_arithmetic(high, jnp.int32(16)).astype(jnp.int16)
  return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 2.0**8
