"""Grouped attention through Pallas-Triton, for GPUs older than Hopper: checks and gradient.

JAX will remove this lowering; all code that depends on it is in files named triton_*.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float

from pallas_kernels.dispatch import find_target, refuse
from pallas_kernels.grouped_attention.block_sizes import triton_blocks, TritonBlocks
from pallas_kernels.grouped_attention.kv_sources import (
  HeadOrder,
  kv_cotangent,
  KVSources,
  pad_ranges,
)
from pallas_kernels.grouped_attention.triton_dkdv import triton_dkdv
from pallas_kernels.grouped_attention.triton_dq import triton_dq
from pallas_kernels.grouped_attention.triton_forward import triton_forward


@dataclasses.dataclass(frozen=True)
class _Static:
  scale: float
  group_bias: float
  max_window: int
  blocks: TritonBlocks
  interpret: bool


def grouped_attention_triton(
  query: Float[Array, "B L H D"],
  sources: KVSources,
  *,
  scale: float,
  group_bias: float,
  max_window: int,
  head_order: HeadOrder | None = None,
  blocks: TritonBlocks | None = None,
  interpret: bool = False,
) -> Float[Array, "B L H D"]:
  """See `grouped_attention`. `blocks` overrides the tile sizes, `interpret` runs on a CPU.

  Raises:
    NotImplementedError: for the reasons of `refusal`.
  """
  del head_order
  refuse(refusal(query, sources))

  def at_least_one(x: Array) -> Array:
    """An empty source gets a token that no query sees: an array of size 0 has no address."""
    return x if x.shape[1] else jnp.zeros((x.shape[0], 1, *x.shape[2:]), x.dtype)

  target = find_target(query, sources)
  blocks = blocks or triton_blocks(target.kind, query.shape[-1], query.dtype.itemsize)
  static = _Static(scale, group_bias, max_window, blocks, interpret)
  sources = sources.with_kv(jax.tree.map(at_least_one, sources.kv))
  return _attend(query, sources, static)


def refusal(query: Array, sources: KVSources, **_: Any) -> str | None:
  """Why these kernels cannot run a call of `grouped_attention`; None if they can."""
  del sources
  D = query.shape[-1]
  if D < 16 or D & (D - 1):
    return f"head_dim is {D}; it must be a power of two, 16 or more"
  if query.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
    return f"dtype is {query.dtype}; it must be float16, bfloat16 or float32"
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(query: Array, sources: KVSources, static: _Static) -> Array:
  return _attend_fwd(query, sources, static)[0]


def _attend_fwd(query: Array, sources: KVSources, static: _Static) -> tuple[Array, tuple]:
  tile = static.blocks.forward
  out, lse2 = triton_forward(
    query,
    _pad_to_tiles(sources, tile.block_q),
    scale=static.scale,
    group_bias=static.group_bias,
    max_window=static.max_window,
    tile=tile,
    interpret=static.interpret,
  )
  return out, (query, sources, out, lse2)


def _attend_bwd(static: _Static, residuals: tuple, dout: Array) -> tuple:
  query, sources, out, lse2 = residuals
  tile = static.blocks.dq
  dq, delta = triton_dq(
    query,
    _pad_to_tiles(sources, tile.block_q),
    out,
    lse2,
    dout,
    scale=static.scale,
    group_bias=static.group_bias,
    max_window=static.max_window,
    tile=tile,
    interpret=static.interpret,
  )
  heads_per_kv = query.shape[2] // sources.focal.key.shape[2]
  key_grads = functools.partial(
    triton_dkdv,
    lse2=lse2,
    delta=delta,
    dout=dout,
    scale=static.scale,
    tile=static.blocks.dkdv,
    interpret=static.interpret,
  )
  # Focal tokens and groups give few programs with many steps: one query head a program keeps the
  # GPU busy. The window gives many short programs: all heads in one avoid the partial sums.
  focal = key_grads(query, sources.focal, bias=0.0, heads_per_program=1)
  group = key_grads(query, sources.group, bias=static.group_bias, heads_per_program=1)
  window = key_grads(query, sources.window, bias=0.0, heads_per_program=heads_per_kv)
  return dq, kv_cotangent((focal, group, window))


def _pad_to_tiles(sources: KVSources, block_q: int) -> KVSources:
  return pad_ranges(sources, pl.cdiv(sources.focal.start.shape[-1], block_q) * block_q)


_attend.defvjp(_attend_fwd, _attend_bwd)
