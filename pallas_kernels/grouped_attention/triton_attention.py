"""Grouped attention through Pallas-Triton: checks, padding and the custom gradient.

The route for GPUs older than Hopper. JAX will remove this backend, hence files of its own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.dispatch import find_target
from pallas_kernels.grouped_attention.block_sizes import triton_blocks, TritonBlocks
from pallas_kernels.grouped_attention.bounds import Bounds
from pallas_kernels.grouped_attention.tile_ranges import make_sources, pad_bounds
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
  focal_key: Float[Array, "B r N D"],
  focal_value: Float[Array, "B r N D"],
  group_key: Float[Array, "B k N D"],
  group_value: Float[Array, "B k N D"],
  window_key: Float[Array, "B w N D"],
  window_value: Float[Array, "B w N D"],
  bounds: Bounds,
  *,
  scale: float,
  group_bias: float,
  max_window: int,
  blocks: TritonBlocks | None = None,
  interpret: bool = False,
) -> Float[Array, "B L H D"]:
  """See `grouped_attention`. `blocks` overrides the tile sizes, `interpret` runs on a CPU.

  Raises:
    NotImplementedError: for a head dim that is no power of two of at least 16, or a dtype other
      than float16, bfloat16 and float32.
  """
  D = query.shape[-1]
  if D < 16 or D & (D - 1):
    raise NotImplementedError(f"head_dim is {D}; this backend wants a power of two, 16 or more.")
  if query.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
    raise NotImplementedError(
      f"dtype is {query.dtype}; this backend has float16, bfloat16 and float32."
    )
  entries = tuple(
    # A source without entries gets one that nobody sees: arrays of size 0 have no address.
    x if x.shape[1] else jnp.zeros((x.shape[0], 1, *x.shape[2:]), x.dtype)
    for x in (focal_key, focal_value, group_key, group_value, window_key, window_value)
  )
  blocks = blocks or triton_blocks(find_target(query).kind, D, query.dtype.itemsize)
  static = _Static(scale, group_bias, max_window, blocks, interpret)
  return _attend(query, entries, bounds, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(query: Array, entries: tuple[Array, ...], bounds: Bounds, static: _Static) -> Array:
  return _attend_fwd(query, entries, bounds, static)[0]


def _attend_fwd(
  query: Array, entries: tuple[Array, ...], bounds: Bounds, static: _Static
) -> tuple[Array, tuple]:
  tile = static.blocks.forward
  out, lse2 = triton_forward(
    query,
    make_sources(entries, pad_bounds(bounds, tile.block_q)),
    scale=static.scale,
    group_bias=static.group_bias,
    max_window=static.max_window,
    tile=tile,
    interpret=static.interpret,
  )
  return out, (query, entries, bounds, out, lse2)


def _attend_bwd(static: _Static, residuals: tuple, dout: Array) -> tuple:
  query, entries, bounds, out, lse2 = residuals
  tile = static.blocks.dq
  dq, delta = triton_dq(
    query,
    make_sources(entries, pad_bounds(bounds, tile.block_q)),
    out,
    lse2,
    dout,
    scale=static.scale,
    group_bias=static.group_bias,
    max_window=static.max_window,
    tile=tile,
    interpret=static.interpret,
  )
  sources = make_sources(entries, bounds)
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
  # Few long tiles in the prefixes: one query head a program keeps the GPU busy. Many short ones
  # in the window: all heads in one program spare the partial sums.
  focal = key_grads(query, sources.focal, bias=0.0, heads_per_program=1)
  group = key_grads(query, sources.group, bias=static.group_bias, heads_per_program=1)
  window = key_grads(query, sources.window, bias=0.0, heads_per_program=heads_per_kv)
  return dq, (*focal, *group, *window), None


_attend.defvjp(_attend_fwd, _attend_bwd)
