"""Grouped attention through Pallas Mosaic GPU (Hopper): checks, padding and the gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.dispatch import find_target
from pallas_kernels.grouped_attention.block_sizes import (
  mosaic_blocks,
  MosaicBlocks,
  multiprocessors,
)
from pallas_kernels.grouped_attention.bounds import Bounds
from pallas_kernels.grouped_attention.mosaic_gpu_dkdv import ENTRIES, mosaic_gpu_dkdv
from pallas_kernels.grouped_attention.mosaic_gpu_dq import mosaic_gpu_dq
from pallas_kernels.grouped_attention.mosaic_gpu_forward import mosaic_gpu_forward
from pallas_kernels.grouped_attention.mosaic_gpu_pipeline import pcast_like, WorkSplit
from pallas_kernels.grouped_attention.tile_ranges import (
  make_sources,
  query_spans,
  ROW_UNIT,
  Source,
  Sources,
  tile_ranges,
)


@dataclasses.dataclass(frozen=True)
class _Static:
  scale: float
  group_bias: float
  max_window: int
  blocks: MosaicBlocks
  programs: int
  interpret: Any


def grouped_attention_mosaic_gpu(
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
  blocks: MosaicBlocks | None = None,
  programs: int | None = None,
  interpret: Any = None,
) -> Float[Array, "B L H D"]:
  """See `grouped_attention`. `blocks` overrides the tile sizes, `interpret` runs on a CPU.

  `programs` of them stay on the GPU and share the work, by default one a multiprocessor.

  Arrays whose lengths are no multiple of 8 are copied; L and the sources' sizes should be.

  Raises:
    NotImplementedError: for a head dim other than 64 and 128, a dtype other than float16 and
      bfloat16, or a scale that is not positive.
  """
  L, D = query.shape[1], query.shape[3]
  if D not in (64, 128):
    raise NotImplementedError(f"head_dim is {D}; this backend has 64 and 128.")
  if query.dtype not in (jnp.float16, jnp.bfloat16):
    raise NotImplementedError(f"dtype is {query.dtype}; this backend has float16 and bfloat16.")
  if scale <= 0:
    raise NotImplementedError(f"scale is {scale}; this backend wants a positive one.")
  entries = (focal_key, focal_value, group_key, group_value, window_key, window_value)
  blocks = blocks or mosaic_blocks(find_target(query).kind, D)
  programs = programs or multiprocessors()
  static = _Static(scale, group_bias, max_window, blocks, programs, interpret)
  padded = tuple(_pad_rows(x, ENTRIES) for x in entries)
  return _attend(_pad_rows(query, ROW_UNIT), padded, bounds, static)[:, :L]


def _pad_rows(x: Array, least: int) -> Array:
  """[B, S, ...] with zeros up to `least` rows and a multiple of what the TMA unit copies."""
  short = max(least - x.shape[1], -x.shape[1] % ROW_UNIT)
  return jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0))) if short else x


def _pad_bounds(bounds: Bounds, length: int) -> Bounds:
  """Repeats the last query's bounds up to `length` queries."""
  short = length - bounds.focal_start.shape[-1]
  return Bounds(*(jnp.pad(x, ((0, 0), (0, 0), (0, short)), mode="edge") for x in bounds))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(query: Array, entries: tuple[Array, ...], bounds: Bounds, static: _Static) -> Array:
  return _attend_fwd(query, entries, bounds, static)[0]


def _query_side(
  query: Array, entries: tuple[Array, ...], bounds: Bounds
) -> tuple[WorkSplit, Sources, Array]:
  """What the kernels that hold queries share."""
  split = WorkSplit.of(query.shape[2], entries[0].shape[2])
  padded_L = split.grid(query)[0] * split.queries
  sources = make_sources(entries, _pad_bounds(bounds, padded_L))
  return split, sources, tile_ranges(sources, split.queries)


def _attend_fwd(
  query: Array, entries: tuple[Array, ...], bounds: Bounds, static: _Static
) -> tuple[Array, tuple]:
  split, sources, spans = _query_side(query, entries, bounds)
  results = mosaic_gpu_forward(
    query,
    sources,
    spans,
    split=split,
    scale=static.scale,
    group_bias=static.group_bias,
    max_window=static.max_window,
    tile=static.blocks.forward,
    programs=static.programs,
    interpret=static.interpret,
  )
  out, lse2 = pcast_like(query, results)
  return out, (query, entries, bounds, out, lse2)


def _attend_bwd(static: _Static, residuals: tuple, dout: Array) -> tuple:
  query, entries, bounds, out, lse2 = residuals
  split, sources, spans = _query_side(query, entries, bounds)
  delta = jnp.einsum("blhd,blhd->bhl", out, dout, preferred_element_type=jnp.float32)
  delta = jnp.pad(delta, ((0, 0), (0, 0), (0, lse2.shape[-1] - delta.shape[-1])))
  dq = mosaic_gpu_dq(
    query,
    sources,
    spans,
    lse2,
    delta,
    dout,
    split=split,
    scale=static.scale,
    group_bias=static.group_bias,
    max_window=static.max_window,
    tile=static.blocks.dq,
    programs=static.programs,
    interpret=static.interpret,
  )
  tile = static.blocks.dkdv
  L = bounds.focal_start.shape[-1]
  sources = make_sources(entries, _pad_bounds(bounds, query.shape[1] + tile.block_q))
  whole = query.shape[2] // entries[0].shape[2]
  # Few long tiles in the prefixes: half the query heads in a tile of work keep the GPU busy. Many
  # short ones in the window: all heads in one spare the partial sums.
  half = whole // 2 if whole % 2 == 0 else whole
  key_grads: list[Array] = []
  for name, source, bias, heads in (
    ("focal", sources.focal, 0.0, half),
    ("group", sources.group, static.group_bias, half),
    ("window", sources.window, 0.0, whole),
  ):
    grads = mosaic_gpu_dkdv(
      query,
      source,
      query_spans(source.start[..., :L], source.end[..., :L], source.key.shape[1], ENTRIES),
      lse2,
      delta,
      dout,
      scale=static.scale,
      bias=bias,
      heads=heads,
      tile=tile,
      programs=static.programs,
      name=name,
      interpret=static.interpret,
    )
    key_grads += [_sum_heads(x, source) for x in grads]
  return pcast_like(query, dq), pcast_like(query, tuple(key_grads)), None


def _sum_heads(partial_BxSxPxD: Array, source: Source) -> Array:
  """[B, S, N, D] from the sums over parts of the query heads, without padding."""
  B, S, N, D = source.key.shape
  partial = partial_BxSxPxD[:, :S].reshape(B, S, N, -1, D)
  if partial.shape[3] == 1:
    return partial[:, :, :, 0].astype(source.key.dtype)
  return partial.sum(axis=3).astype(source.key.dtype)


_attend.defvjp(_attend_fwd, _attend_bwd)
