"""The product of a few rows with a weight in 8 bits, lowered through Pallas-Triton.

A program computes a few output channels of all rows. It reads the numbers of these channels once,
in 8 bits, and converts them in registers. For few rows it multiplies
and adds element by element and sums over the inputs at the end. More rows are a matrix product.

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
from pallas_kernels.quantized_product.xla import rms_norm
from pallas_kernels.triton_common import dot, padded_slice

_MOST_VECTOR_ROWS = 4


class Tile(NamedTuple):
  """The tile of a weight that a program reads at a time, and its launch parameters."""

  channels: int
  inputs: int
  num_warps: int
  num_stages: int = 2


_VECTOR_TILE = Tile(4, 1024, 4)
_DOT_TILE = Tile(32, 256, 4, 4)


class _Operands(NamedTuple):
  """The operands of a kernel: arrays, their block specs, or references.

  Numbers and scales are those of the product, or those of gate and up.
  """

  x: Any
  numbers: list[Any]
  scales: list[Any]
  norm: Any
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
  (B, inputs), parts = x_BxK.shape, range(2 if swiglu else 1)
  channels = numbers_TxK.shape[0] // len(parts)
  vector = B <= _MOST_VECTOR_ROWS
  tile = _fitted(tile or (_VECTOR_TILE if vector else _DOT_TILE), channels, inputs, vector)
  if norm_scale is not None and not vector:
    # In the loop over the inputs, the norm would delay the loads of the weight.
    x_BxK, norm_scale = rms_norm(x_BxK, norm_scale, epsilon), None
  T = tile.channels
  programs = channels // T
  out_block = pl.BlockSpec((B, T), lambda t: (0, t))

  def channel_block(part: int, *width: int) -> pl.BlockSpec:
    return pl.BlockSpec((T, *width), lambda t: (t + part * programs, *[0] * len(width)))

  arrays = _Operands(
    x_BxK, [numbers_TxK for _ in parts], [scale_T for _ in parts], norm_scale, residual
  )
  specs = _Operands(
    pl.BlockSpec((B, inputs), lambda t: (0, 0)),
    [channel_block(part, inputs) for part in parts],
    [channel_block(part) for part in parts],
    None if norm_scale is None else pl.BlockSpec((inputs,), lambda t: (0,)),
    None if residual is None else out_block,
  )
  out: Array = pl.pallas_call(
    functools.partial(_vector_kernel if vector else _dot_kernel, tile=tile, epsilon=epsilon),
    grid=(programs,),
    in_specs=[specs],
    out_specs=out_block,
    out_shape=out_struct(x_BxK, (B, channels), x_BxK.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name="quantized_product",
  )(arrays)
  return out


def _fitted(tile: Tile, channels: int, inputs: int, vector: bool) -> Tile:
  """The tile with a divisor of the channels, and of the inputs for a matrix product."""
  K = pl.next_power_of_2(inputs) if vector else inputs & -inputs
  return tile._replace(
    channels=min(tile.channels, channels & -channels), inputs=min(tile.inputs, K)
  )


def _vector_kernel(ref: _Operands, out_ref: Any, *, tile: Tile, epsilon: float) -> None:
  (B, E), K, T = ref.x.shape, tile.inputs, tile.channels
  sums = [[jnp.zeros((T, K), jnp.float32) for _ in ref.numbers] for _ in range(B)]
  squares = [jnp.zeros((K,), jnp.float32) for _ in range(B)]
  for first in range(0, E, K):
    load = functools.partial(_load_inputs, first=first, inputs=E, K=K)
    tiles = [load(numbers.at[:, padded_slice(first, K)]) for numbers in ref.numbers]
    norm_K = None if ref.norm is None else load(ref.norm.at[padded_slice(first, K)])
    for b in range(B):
      x_K = load(ref.x.at[jnp.int32(b), padded_slice(first, K)])
      if norm_K is not None:
        squares[b] += x_K * x_K
        x_K *= norm_K
      sums[b] = [total + w_TxK * x_K[None] for total, w_TxK in zip(sums[b], tiles, strict=True)]
  for b in range(B):
    factor = 1.0 if ref.norm is None else lax.rsqrt(squares[b].sum() / E + epsilon)
    row = jnp.int32(b)
    out_T = _combine_parts(
      [
        total.sum(axis=1) * factor * scale[...]
        for total, scale in zip(sums[b], ref.scales, strict=True)
      ]
    )
    if ref.residual is not None:
      out_T += ref.residual[row, :].astype(jnp.float32)
    out_ref[row, :] = out_T.astype(out_ref.dtype)


def _load_inputs(part: Any, *, first: int, inputs: int, K: int) -> Array:
  """Values of K inputs from the given one on, in float32; zeros beyond the last input."""
  if first + K <= inputs:
    return plgpu.load(part).astype(jnp.float32)
  mask = jnp.broadcast_to(first + jnp.arange(K) < inputs, part.shape)
  return plgpu.load(part, mask=mask, other=0).astype(jnp.float32)


def _dot_kernel(ref: _Operands, out_ref: Any, *, tile: Tile, epsilon: float) -> None:
  del epsilon  # The rows are normalised before.
  (B, E), K, T = ref.x.shape, tile.inputs, tile.channels
  M = max(MIN_DOT_SIDE, pl.next_power_of_2(B))
  rows, exists_M = padded_slice(0, M), jnp.arange(M) < B

  def step(k: Array, sums: list[Array]) -> list[Array]:
    at = padded_slice(k * K, K)
    mask = jnp.broadcast_to(exists_M[:, None], (M, K))
    x_MxK = plgpu.load(ref.x.at[rows, at], mask=mask, other=0.0)
    return [
      total + dot(x_MxK, plgpu.load(numbers.at[:, at]).astype(x_MxK.dtype), trans_b=True)
      for total, numbers in zip(sums, ref.numbers, strict=True)
    ]

  zeros = [jnp.zeros((M, T), jnp.float32) for _ in ref.numbers]
  products = lax.fori_loop(0, E // K, step, zeros)
  out_MxT = _combine_parts(
    [product * scale[...][None] for product, scale in zip(products, ref.scales, strict=True)]
  )
  mask = jnp.broadcast_to(exists_M[:, None], (M, T))
  if ref.residual is not None:
    out_MxT += plgpu.load(ref.residual.at[rows, :], mask=mask, other=0.0).astype(jnp.float32)
  plgpu.store(out_ref.at[rows, :], out_MxT.astype(out_ref.dtype), mask=mask)


def _combine_parts(parts: list[Array]) -> Array:
  """The product itself, or silu(gate) ⊙ up."""
  if len(parts) == 1:
    return parts[0]
  gate, up = parts
  return gate * up / (1 + jnp.exp(-gate))
