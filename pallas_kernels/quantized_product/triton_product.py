"""The product of a few rows with weights in 8 bits, lowered through Pallas-Triton.

A program computes a few output channels of all rows. It reads tiles of their weights in 8 bits and
converts them in registers.

Letters: M rows, rounded up; B of them exist. T output channels of a program. K inputs of a tile.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.kernel_common import out_struct
from pallas_kernels.triton_common import dot, padded_slice

_MIN_DOT_SIDE = 16


class Tile(NamedTuple):
  way: str = "dot"
  channels: int = 32
  inputs: int = 256
  num_warps: int = 4
  num_stages: int = 4


def quantized_product_triton(
  x_BxK: Array,
  numbers_TxK: Array,
  scale_T: Array,
  *,
  tile: Tile | None = None,
  interpret: bool = False,
) -> Array:
  (B, inputs), channels = x_BxK.shape, numbers_TxK.shape[0]
  tile = tile or Tile()
  T = tile.channels
  kernel = {"dot": _dot_kernel, "swap": _swap_kernel, "fma": _fma_kernel}[tile.way]
  out: Array = pl.pallas_call(
    functools.partial(kernel, tile=tile),
    grid=(pl.cdiv(channels, T),),
    in_specs=[
      pl.BlockSpec((B, inputs), lambda t: (0, 0)),
      pl.BlockSpec((T, inputs), lambda t: (t, 0)),
      pl.BlockSpec((T,), lambda t: (t,)),
    ],
    out_specs=pl.BlockSpec((B, T), lambda t: (0, t)),
    out_shape=out_struct(x_BxK, (B, channels), x_BxK.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name=f"qp_{channels}x{inputs}_{'_'.join(map(str, tile))}",
  )(x_BxK, numbers_TxK, scale_T)
  return out


def _dot_kernel(x_ref: Any, w_ref: Any, scale_ref: Any, out_ref: Any, *, tile: Tile) -> None:
  B, E = x_ref.shape
  K, T = tile.inputs, tile.channels
  M = max(_MIN_DOT_SIDE, pl.next_power_of_2(B))
  exists_M = jnp.arange(M) < B
  rows = padded_slice(0, M)
  mask = jnp.broadcast_to(exists_M[:, None], (M, K))

  def step(k: Array, sums: Array) -> Array:
    at = padded_slice(k * K, K)
    x_MxK = plgpu.load(x_ref.at[rows, at], mask=mask, other=0.0)
    w_TxK = plgpu.load(w_ref.at[:, at])
    return sums + dot(x_MxK, w_TxK.astype(x_MxK.dtype), trans_b=True)

  acc = lax.fori_loop(0, E // K, step, jnp.zeros((M, T), jnp.float32))
  acc = acc * scale_ref[...][None]
  mask = jnp.broadcast_to(exists_M[:, None], (M, T))
  plgpu.store(out_ref.at[rows, :], acc.astype(out_ref.dtype), mask=mask)


def _swap_kernel(x_ref: Any, w_ref: Any, scale_ref: Any, out_ref: Any, *, tile: Tile) -> None:
  B, E = x_ref.shape
  K, T = tile.inputs, tile.channels
  M = max(_MIN_DOT_SIDE, pl.next_power_of_2(B))
  exists_M = jnp.arange(M) < B
  rows = padded_slice(0, M)
  mask = jnp.broadcast_to(exists_M[:, None], (M, K))

  def step(k: Array, sums: Array) -> Array:
    at = padded_slice(k * K, K)
    x_MxK = plgpu.load(x_ref.at[rows, at], mask=mask, other=0.0)
    w_TxK = plgpu.load(w_ref.at[:, at])
    return sums + dot(w_TxK.astype(x_MxK.dtype), x_MxK, trans_b=True)

  acc = lax.fori_loop(0, E // K, step, jnp.zeros((T, M), jnp.float32))
  acc = (acc * scale_ref[...][:, None]).T
  mask = jnp.broadcast_to(exists_M[:, None], (M, T))
  plgpu.store(out_ref.at[rows, :], acc.astype(out_ref.dtype), mask=mask)


def _fma_kernel(x_ref: Any, w_ref: Any, scale_ref: Any, out_ref: Any, *, tile: Tile) -> None:
  B, E = x_ref.shape
  K, T = tile.inputs, tile.channels
  whole, rest = divmod(E, K)
  sums = [jnp.zeros((T, K), jnp.float32) for _ in range(B)]
  for k in range(whole + bool(rest)):
    at = padded_slice(k * K, K)
    in_K = jnp.arange(K) < E - k * K
    if k < whole:
      w_TxK = plgpu.load(w_ref.at[:, at])
    else:
      w_TxK = plgpu.load(w_ref.at[:, at], mask=jnp.broadcast_to(in_K[None], (T, K)), other=0)
    w = w_TxK.astype(jnp.float32)
    for b in range(B):
      part = x_ref.at[jnp.int32(b), at]
      x = plgpu.load(part) if k < whole else plgpu.load(part, mask=in_K, other=0.0)
      sums[b] += w * x.astype(jnp.float32)[None]
  for b in range(B):
    out_ref[jnp.int32(b), :] = (sums[b].sum(axis=1) * scale_ref[...]).astype(out_ref.dtype)
