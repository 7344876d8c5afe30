"""Stream compaction by matrix products on a TPU, whose scatter is sequential.

A program serves one row, in runs of positions. The slots of a run are in a few units of 128 slots
of the list. Each of these units adds a product of the positions, byte by byte, with the one-hot
matrix of their slots.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Int

from pallas_kernels.dispatch import refuse
from pallas_kernels.kernel_common import out_struct
from pallas_kernels.mosaic_tpu_common import dot, Interpret, LANES, SUBLANES

_MAX_ROW = 2**19  # positions or slots of a row: all of it is in VMEM
_MAX_POSITIONS = 2**24  # of all rows: scalar memory holds two numbers for every 256
_RUN = 256  # positions of a product
_DIGITS = 3  # bytes of a position, which bfloat16 holds exactly


def compact_indices_mosaic_tpu(
  slot: Int[Array, "*rows L"],
  chosen: Bool[Array, "*rows L"],
  size: int,
  *,
  interpret: Interpret = False,
) -> Int[Array, "*rows size"]:
  """See `compact_indices`.

  Raises:
    NotImplementedError: for the reasons of `refusal`.
  """
  refuse(refusal(slot, chosen, size))
  L = slot.shape[-1]
  runs, units = pl.cdiv(L, _RUN), pl.cdiv(size, LANES)
  slot_AxL = jnp.where(chosen & (slot >= 0) & (slot < size), slot, -1).reshape(-1, L)
  slot_AxL = jnp.pad(slot_AxL, ((0, 0), (0, runs * _RUN - L)), constant_values=-1)
  rows = slot_AxL.shape[0]
  slot_Axrx1xR = slot_AxL.reshape(rows, runs, 1, _RUN)
  slot_AxrxR = slot_Axrx1xR[:, :, 0]
  last_Axr = slot_AxrxR.max(axis=-1)
  first_Axr = jnp.where(slot_AxrxR < 0, size, slot_AxrxR).min(axis=-1)
  first_unit_Axr = jnp.where(last_Axr < 0, 0, first_Axr // LANES)
  end_unit_Axr = jnp.where(last_Axr < 0, 0, last_Axr // LANES + 1)
  # The units that hold a run's slots in the usual case are written without a branch.
  at_once = 3 if 4 * size > L else 1
  list_Axux1xW: Array = pl.pallas_call(
    functools.partial(_kernel, at_once=at_once),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(rows,),
      in_specs=[pl.BlockSpec((None, runs, 1, _RUN), lambda a, *_: (a, 0, 0, 0))],
      out_specs=pl.BlockSpec((None, units + at_once, 1, LANES), lambda a, *_: (a, 0, 0, 0)),
    ),
    out_shape=out_struct(slot, (rows, units + at_once, 1, LANES), jnp.int32),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    cost_estimate=pl.CostEstimate(
      flops=2 * rows * (runs + units) * _RUN * LANES * SUBLANES,
      bytes_accessed=4 * rows * (L + size),
      transcendentals=0,
    ),
    interpret=interpret,
    name="compact_indices",
  )(first_unit_Axr, end_unit_Axr, slot_Axrx1xR)
  list_AxS = list_Axux1xW.reshape(rows, -1)[:, :size]
  return jnp.where(list_AxS == 0, L, list_AxS - 1).reshape(*slot.shape[:-1], size)


def refusal(slot: Array, chosen: Array, size: int) -> str | None:
  """Why this kernel cannot run a call of `compact_indices`; None if it can."""
  del chosen
  if 0 in slot.shape or size == 0:
    return f"slot has shape {slot.shape} and size is {size}; neither may be empty"
  if max(slot.shape[-1], size) > _MAX_ROW:
    return f"a row has {slot.shape[-1]} positions and {size} slots; at most {_MAX_ROW} fit VMEM"
  if slot.size > _MAX_POSITIONS:
    return f"slot has {slot.size} positions; at most {_MAX_POSITIONS} fit scalar memory"
  return None


def _kernel(
  first_unit_ref: Any, end_unit_ref: Any, slot_ref: Any, list_ref: Any, *, at_once: int
) -> None:
  row = pl.program_id(0)
  list_ref[...] = jnp.zeros_like(list_ref)

  @pl.loop(0, slot_ref.shape[0])
  def _(run: Array) -> None:
    slot_1xR = slot_ref[run]
    digits_8xR = _digits(run)

    def add(unit: Array) -> None:
      slot_Wx1 = unit * LANES + lax.broadcasted_iota(jnp.int32, (LANES, 1), 0)
      has_WxR = (slot_Wx1 == slot_1xR).astype(jnp.bfloat16)
      sums_8xW = dot(digits_8xR, has_WxR, (1, 1)).astype(jnp.int32)
      positions_1xW = sum(sums_8xW[i : i + 1] << (8 * i) for i in range(_DIGITS))
      list_ref[unit] = list_ref[unit] + positions_1xW

    first, end = first_unit_ref[row, run], end_unit_ref[row, run]
    for i in range(at_once):
      add(first + i)
    pl.loop(first + at_once, end)(add)


def _digits(run: Array) -> Array:
  """[8, R] bfloat16: the bytes of position + 1, so that 0 means an empty slot; then zeros."""
  shape = (SUBLANES, _RUN)
  position = run * _RUN + 1 + lax.broadcasted_iota(jnp.int32, shape, 1)
  digit = lax.broadcasted_iota(jnp.int32, shape, 0)
  byte = lax.shift_right_logical(position, 8 * jnp.minimum(digit, _DIGITS)) & 255
  return jnp.where(digit < _DIGITS, byte, 0).astype(jnp.float32).astype(jnp.bfloat16)
