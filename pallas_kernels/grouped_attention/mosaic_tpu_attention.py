"""Grouped attention for TPUs through Pallas Mosaic: checks, layout and the custom gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float

from pallas_kernels.dispatch import find_target, refuse
from pallas_kernels.grouped_attention.kv_sources import HeadOrder, KVSources
from pallas_kernels.grouped_attention.mosaic_tpu_blocks import tpu_blocks, TpuBlocks
from pallas_kernels.grouped_attention.mosaic_tpu_dkdv import mosaic_tpu_dkdv
from pallas_kernels.grouped_attention.mosaic_tpu_dq import mosaic_tpu_dq
from pallas_kernels.grouped_attention.mosaic_tpu_forward import mosaic_tpu_forward
from pallas_kernels.grouped_attention.mosaic_tpu_ops import KVTile, scaled
from pallas_kernels.grouped_attention.mosaic_tpu_schedule import (
  FOCAL,
  GROUP,
  Operands,
  pack_bounds,
  pack_query_ranges,
  pad_to,
  round_up,
  TileSchedule,
  WINDOW,
)
from pallas_kernels.kernel_common import LOG2_E
from pallas_kernels.mosaic_tpu_common import Interpret

_SCALAR_MEMORY = 2**19  # bytes for the ranges of tiles; a chip has twice as many


@dataclasses.dataclass(frozen=True)
class _Static:
  schedule: TileSchedule
  blocks: TpuBlocks
  interpret: Interpret


def grouped_attention_mosaic_tpu(
  query: Float[Array, "B L H D"],
  sources: KVSources,
  *,
  scale: float,
  group_bias: float,
  max_window: int,
  head_order: HeadOrder | None = None,
  blocks: TpuBlocks | None = None,
  interpret: Interpret = False,
) -> Float[Array, "B L H D"]:
  """See `grouped_attention`. `blocks` overrides the tile sizes, `interpret` runs on a CPU.

  Arrays are laid out heads first, at no cost if XLA lets their producer write that layout. L and
  the length of the window should be multiples of 256: other arrays are copied to pad them.

  Raises:
    NotImplementedError: for the reasons of `refusal`.
  """
  del head_order
  options: dict[str, Any] = {"scale": scale, "group_bias": group_bias, "max_window": max_window}
  refuse(refusal(query, sources, blocks=blocks, **options))
  L = query.shape[1]
  blocks = blocks or _blocks_for(query, sources)
  schedule = schedule_of(blocks, query, sources, **options)
  length = round_up(
    L, max(schedule.block_q, schedule.summary_grad.block_q, schedule.window_grad.block_q)
  )

  focal, group, _ = sources

  def summaries(focal_x: Array, group_x: Array) -> Array:
    parts = [
      pad_to(focal_x, 1, schedule.group_offset),
      pad_to(group_x, 1, schedule.summaries - schedule.group_offset),
    ]
    return jnp.concatenate(parts, axis=1).transpose(0, 2, 1, 3)

  def padded_window(x: Array) -> Array:
    size = max(schedule.window, round_up(x.shape[1], schedule.window_grad.block_k))
    return pad_to(x, 1, size).transpose(0, 2, 1, 3)

  operands = Operands(
    pad_to(query, 1, length).swapaxes(1, 2),
    # The logit scale is multiplied in here, on fewer numbers than the logits.
    scaled(summaries(focal.key, group.key), schedule.scale2),
    summaries(focal.value, group.value),
    padded_window(sources.window.key),
    padded_window(sources.window.value),
    pack_bounds(sources, schedule.group_offset, length),
  )
  out_BxHxLxD = _attend(operands, _Static(schedule, blocks, interpret))
  return out_BxHxLxD.swapaxes(1, 2)[:, :L]


def refusal(
  query: Array, sources: KVSources, *, blocks: TpuBlocks | None = None, **options: Any
) -> str | None:
  """Why these kernels cannot run a call of `grouped_attention`; None if they can."""
  B, L, _, D = query.shape
  if D not in (64, 128, 256):
    return f"head_dim is {D}; it must be 64, 128 or 256"
  if query.dtype not in (jnp.bfloat16, jnp.float32):
    return f"dtype is {query.dtype}; it must be bfloat16 or float32"
  schedule = schedule_of(blocks or _blocks_for(query, sources), query, sources, **options)
  size = schedule.scalar_bytes(B * sources.focal.start.shape[1], L)
  if size > _SCALAR_MEMORY:
    return (
      f"query has {B} rows of {L} tokens, whose tile ranges take {size} bytes of scalar memory; at "
      f"most {_SCALAR_MEMORY} fit: split the batch"
    )
  return None


def _blocks_for(query: Array, sources: KVSources) -> TpuBlocks:
  return tpu_blocks(find_target(query, sources).kind, query.dtype.itemsize)


def schedule_of(
  blocks: TpuBlocks,
  query: Array,
  sources: KVSources,
  *,
  scale: float,
  group_bias: float,
  max_window: int,
  head_order: HeadOrder | None = None,
) -> TileSchedule:
  """Static sizes of a call, from its arrays or their shapes."""
  del head_order
  return TileSchedule.for_call(
    blocks,
    dtype=query.dtype,
    head_dim=query.shape[3],
    heads_per_kv=query.shape[2] // sources.focal.key.shape[2],
    length=query.shape[1],
    focal=sources.focal.key.shape[1],
    groups=sources.group.key.shape[1],
    max_window=max_window,
    shared_bounds=sources.focal.start.shape[1] == 1,
    scale2=scale * LOG2_E,
    group_bias2=group_bias * LOG2_E,
  )


def summary_query_ranges(bounds: Array, schedule: TileSchedule) -> Array:
  """`pack_query_ranges` of the tiles of focal tokens, then of those of groups."""
  tile, offset = schedule.summary_grad, schedule.group_offset
  parts = [
    pack_query_ranges(bounds, FOCAL, 0, offset, tile),
    pack_query_ranges(bounds, GROUP, offset, schedule.summaries - offset, tile),
  ]
  return jnp.concatenate(parts, axis=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(operands: Operands, static: _Static) -> Array:
  return _attend_fwd(operands, static)[0]


def _attend_fwd(operands: Operands, static: _Static) -> tuple[Array, tuple]:
  out, lse2 = mosaic_tpu_forward(
    operands,
    static.schedule,
    cost=_cost(operands, static.schedule, products=2),
    vmem=static.blocks.vmem,
    interpret=static.interpret,
  )
  return out, (operands, out, lse2)


def _attend_bwd(static: _Static, residuals: tuple, dout: Array) -> tuple:
  operands, out, lse2 = residuals
  schedule = static.schedule
  # XLA computes this sum inside the product that makes `dout`. That product takes 2.5 times the
  # cycles where the heads are two axes, P and G.
  delta = jnp.einsum("bhld,bhld->bhl", out, dout, preferred_element_type=jnp.float32)
  options: dict[str, Any] = {"vmem": static.blocks.vmem, "interpret": static.interpret}
  rows = (lse2, delta.reshape(lse2.shape), dout)
  dq = mosaic_tpu_dq(
    operands, schedule, *rows, cost=_cost(operands, schedule, products=3), **options
  )
  summary_grads = mosaic_tpu_dkdv(
    operands,
    schedule,
    KVTile(operands.summary_key, operands.summary_value),
    summary_query_ranges(operands.bounds, schedule),
    *rows,
    sources=(FOCAL, GROUP),
    scale_keys=False,
    tile=schedule.summary_grad,
    cost=_cost(operands, schedule, products=4, window=False),
    name="summaries",
    **options,
  )
  window_size = operands.window_key.shape[2]
  window_grads = mosaic_tpu_dkdv(
    operands,
    schedule,
    KVTile(operands.window_key, operands.window_value),
    pack_query_ranges(operands.bounds, WINDOW, 0, window_size, schedule.window_grad),
    *rows,
    sources=(WINDOW,),
    scale_keys=True,
    tile=schedule.window_grad,
    cost=_cost(operands, schedule, products=4, summaries=False),
    name="window",
    **options,
  )
  return (Operands(dq, *summary_grads, *window_grads, bounds=None),)


def _cost(
  operands: Operands,
  schedule: TileSchedule,
  *,
  products: int,
  summaries: bool = True,
  window: bool = True,
) -> pl.CostEstimate:
  """The cost if queries see half of the summaries and a whole piece of the window."""
  D = operands.query.shape[-1]
  rows = operands.query.size // D
  keys = summaries * schedule.summaries // 2 + window * schedule.window
  arrays = sum(x.size * x.dtype.itemsize for x in operands)
  return pl.CostEstimate(
    flops=2 * products * D * rows * keys,
    transcendentals=rows * keys,
    bytes_accessed=arrays + operands.query.size * operands.query.dtype.itemsize,
  )


_attend.defvjp(_attend_fwd, _attend_bwd)
