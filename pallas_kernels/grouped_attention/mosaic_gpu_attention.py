"""Grouped attention through Pallas Mosaic GPU (Hopper): checks, padding and the gradient."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.dispatch import find_target, refuse
from pallas_kernels.grouped_attention.block_sizes import (
  H100_MULTIPROCESSORS,
  mosaic_blocks,
  MosaicBlocks,
)
from pallas_kernels.grouped_attention.kv_sources import (
  HeadOrder,
  kv_cotangent,
  KVSource,
  KVSources,
  pad_ranges,
)
from pallas_kernels.grouped_attention.mosaic_gpu_dkdv import KEYS, mosaic_gpu_dkdv
from pallas_kernels.grouped_attention.mosaic_gpu_dq import mosaic_gpu_dq
from pallas_kernels.grouped_attention.mosaic_gpu_forward import mosaic_gpu_forward
from pallas_kernels.grouped_attention.mosaic_gpu_pipeline import pcast_like, WorkSplit
from pallas_kernels.grouped_attention.query_chunks import query_chunks
from pallas_kernels.grouped_attention.tile_ranges import (
  query_spans,
  ROW_UNIT,
  sum_heads,
  tile_ranges,
)


@dataclasses.dataclass(frozen=True)
class _Static:
  scale: float
  group_bias: float
  max_window: int
  has_keys: tuple[bool, bool, bool]
  head_order: HeadOrder | None
  blocks: MosaicBlocks
  programs: int
  interpret: Any


def grouped_attention_mosaic_gpu(
  query: Float[Array, "B L H D"],
  sources: KVSources,
  *,
  scale: float,
  group_bias: float,
  max_window: int,
  head_order: HeadOrder | None = None,
  blocks: MosaicBlocks | None = None,
  programs: int | None = None,
  interpret: Any = None,
) -> Float[Array, "B L H D"]:
  """See `grouped_attention`. `blocks` overrides the tile sizes, `interpret` runs on a CPU.

  `programs` persistent programs share the work, by default one for each multiprocessor.

  L and the sizes of the sources should be multiples of 8: other arrays are copied to pad them.

  Raises:
    NotImplementedError: for the reasons of `refusal`.
  """
  refuse(refusal(query, sources, scale=scale))
  L, D = query.shape[1], query.shape[3]
  target = find_target(query, sources)
  blocks = blocks or mosaic_blocks(target.kind, D)
  programs = programs or target.num_cores or H100_MULTIPROCESSORS
  focal, group, window = (source.key.shape[1] > 0 for source in sources)
  has_keys = (focal, group, window)
  if not any(has_keys):
    return jnp.zeros_like(query)
  static = _Static(scale, group_bias, max_window, has_keys, head_order, blocks, programs, interpret)
  padded = sources.with_kv(jax.tree.map(lambda x: _pad_rows(x, KEYS), sources.kv))
  return _attend(_pad_rows(query, ROW_UNIT), padded, static)[:, :L]


def refusal(query: Array, sources: KVSources, *, scale: float, **_: Any) -> str | None:
  """Why these kernels cannot run a call of `grouped_attention`; None if they can."""
  del sources
  D = query.shape[-1]
  if D not in (64, 128):
    return f"head_dim is {D}; it must be 64 or 128"
  if query.dtype not in (jnp.float16, jnp.bfloat16):
    return f"dtype is {query.dtype}; it must be float16 or bfloat16"
  if scale <= 0:
    return f"scale is {scale}; it must be positive"
  return None


def _pad_rows(x: Array, least: int) -> Array:
  """[B, S, N, D] padded with zeros to `least` rows and a multiple of what the TMA unit copies."""
  short = max(least - x.shape[1], -x.shape[1] % ROW_UNIT)
  return jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0))) if short else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(query: Array, sources: KVSources, static: _Static) -> Array:
  return _attend_fwd(query, sources, static)[0]


def _query_side(
  query: Array, sources: KVSources, has_keys: tuple[bool, bool, bool]
) -> tuple[WorkSplit, KVSources, Array]:
  """Arguments that the kernels that hold queries share."""
  split = WorkSplit.for_heads(query.shape[2], sources.focal.key.shape[2])
  sources = pad_ranges(sources, split.grid(query)[0] * split.queries)
  visited = has_keys.index(True)
  return split, sources, tile_ranges(sources, split.queries, visited)


def _attend_fwd(query: Array, sources: KVSources, static: _Static) -> tuple[Array, tuple]:
  split, padded, spans = _query_side(query, sources, static.has_keys)
  results = mosaic_gpu_forward(
    query,
    padded,
    spans,
    split=split,
    scale=static.scale,
    group_bias=static.group_bias,
    max_window=static.max_window,
    has_keys=static.has_keys,
    head_runs=static.head_order and static.head_order.keys,
    tile=static.blocks.forward,
    programs=static.programs,
    interpret=static.interpret,
  )
  out, lse2 = pcast_like(query, results)
  return out, (query, sources, out, lse2)


def _attend_bwd(static: _Static, residuals: tuple, dout: Array) -> tuple:
  query, sources, out, lse2 = residuals
  split, padded, spans = _query_side(query, sources, static.has_keys)
  delta = jnp.einsum("blhd,blhd->bhl", out, dout, preferred_element_type=jnp.float32)
  delta = jnp.pad(delta, ((0, 0), (0, 0), (0, lse2.shape[-1] - delta.shape[-1])))
  dq = mosaic_gpu_dq(
    query,
    padded,
    spans,
    lse2,
    delta,
    dout,
    split=split,
    scale=static.scale,
    group_bias=static.group_bias,
    max_window=static.max_window,
    has_keys=static.has_keys,
    head_runs=static.head_order and static.head_order.keys,
    tile=static.blocks.dq,
    programs=static.programs,
    interpret=static.interpret,
  )
  tile, order = static.blocks.dkdv, static.head_order
  L = sources.focal.start.shape[-1]
  padded = pad_ranges(sources, query.shape[1] + tile.block_q)
  key_grads = []
  for name, source, has_keys in zip(KVSources._fields, padded, static.has_keys, strict=True):
    if not has_keys:
      key_grads.append((jnp.zeros_like(source.key), jnp.zeros_like(source.value)))
      continue
    grads = mosaic_gpu_dkdv(
      query,
      source,
      query_spans(source.start[..., :L], source.end[..., :L], source.key.shape[1], KEYS),
      lse2,
      delta,
      dout,
      scale=static.scale,
      bias=static.group_bias if name == "group" else 0.0,
      chunks=1 if name == "window" else _query_chunks(query, source, static.programs, tile.block_q),
      head_runs=order and (order.keys if name == "window" else order.entries),
      tile=tile,
      programs=static.programs,
      name=name,
      interpret=static.interpret,
    )
    dk, dv = (sum_heads(x, source) for x in grads)
    key_grads.append((dk, dv))
  return pcast_like(query, dq), kv_cotangent(pcast_like(query, key_grads))


def _query_chunks(query: Array, source: KVSource, programs: int, block_q: int) -> int:
  """Chunks of the queries for the focal tokens or the groups.

  The window needs no chunks: its keys are as many as the queries.
  """
  B, L, H, _ = query.shape
  _, S, N, _ = source.key.shape
  return query_chunks(math.ceil(S / KEYS), B * N, H // N * math.ceil(L / block_q), programs)


_attend.defvjp(_attend_fwd, _attend_bwd)
