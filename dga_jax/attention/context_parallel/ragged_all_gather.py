"""Ragged all-gather: each device contributes a variable number of rows.

The bytes sent follow the actual numbers of rows, not their bound. XLA's collectives have static
sizes, so the rows travel in several exchanges of static size, as many as the fullest device needs.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gather import take_rows

# Sizes of the exchanges, as parts of an even share of the rows: the first exchange is 1 + _SLACK
# even shares, each further one _FURTHER of an even share.
_SLACK = 1 / 20
_FURTHER = 1 / 4


class GatherPlan(NamedTuple):
  """Where the S rows of a list are, the same on every device of the mesh axis.

  J, from `slot_count`, is the number of slots for rows on each device.
  """

  device: Int[Array, "B N S"]  # device that holds a row; any device for an absent row
  slot: Int[Array, "B N S"]  # slot of the row on that device; J for an absent row
  rows: Int[Array, "B N C J"]  # row in each slot of each device; S for an empty slot


def slot_count(rows: int, devices: int, most: int) -> int:
  """J: the slots that `ragged_all_gather` needs on each device.

  Args:
    rows: S, static bound on the rows of the list.
    devices: C.
    most: static bound on the rows of one device.
  """
  first, further = exchange_sizes(rows, devices)
  return first + max(0, math.ceil((most - first) / further)) * further


def ragged_all_gather(
  rows_BxJxNxD: Float[Array, "B J N D"], plan: GatherPlan, axis_name: str
) -> Float[Array, "B S N D"]:
  """The whole list on every device; zeros for absent rows.

  The first exchange carries a little more than an even share from every device, which is all where
  the rows are spread evenly. Smaller ones follow until no device has rows left. The backward pass
  sums the gradients over the devices and returns them to the holders by the same exchanges.

  Args:
    rows_BxJxNxD: the rows of this device, in their slots.
    plan: where the rows of the list are.
    axis_name: mesh axis of the devices.
  """
  return _ragged_all_gather(axis_name, rows_BxJxNxD, plan)


def exchange_sizes(rows: int, devices: int) -> tuple[int, int]:
  """Slots of each device in the first exchange, and in each further one."""
  even = rows / devices
  return max(1, math.ceil(even * (1 + _SLACK))), max(1, math.ceil(even * _FURTHER))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged_all_gather(axis_name: str, rows_BxJxNxD: Array, plan: GatherPlan) -> Array:
  B, _, N, D = rows_BxJxNxD.shape

  def exchange(list_BxSxNxD: Array, first: Array | int, size: int) -> Array:
    part_BxjxNxD = jax.lax.dynamic_slice_in_dim(rows_BxJxNxD, first, size, axis=1)
    parts_BxCjxNxD = jax.lax.all_gather(part_BxjxNxD, axis_name, axis=1, tiled=True)
    offset = plan.slot - first
    is_sent = (offset >= 0) & (offset < size)
    index = jnp.where(is_sent, plan.device * size + offset, parts_BxCjxNxD.shape[1])
    return list_BxSxNxD + take_rows(parts_BxCjxNxD, index)

  S = plan.slot.shape[2]
  zero = jnp.zeros((B, S, N, D), rows_BxJxNxD.dtype)
  return _run_exchanges(exchange, zero, plan, _varying_axes(rows_BxJxNxD))


def _forward(axis_name: str, rows_BxJxNxD: Array, plan: GatherPlan) -> tuple[Array, GatherPlan]:
  return _ragged_all_gather(axis_name, rows_BxJxNxD, plan), plan


def _backward(
  axis_name: str, plan: GatherPlan, gradient_BxSxNxD: Array
) -> tuple[Array, GatherPlan | None]:
  B, _, N, D = gradient_BxSxNxD.shape
  C, J = plan.rows.shape[2:]

  def exchange(rows_BxJxNxD: Array, first: Array | int, size: int) -> Array:
    index = jax.lax.dynamic_slice_in_dim(plan.rows, first, size, axis=3)
    parts_BxCjxNxD = take_rows(gradient_BxSxNxD, index.reshape(B, N, C * size))
    part_BxjxNxD = jax.lax.psum_scatter(parts_BxCjxNxD, axis_name, scatter_dimension=1, tiled=True)
    return jax.lax.dynamic_update_slice_in_dim(rows_BxJxNxD, part_BxjxNxD, first, axis=1)

  zero = jnp.zeros((B, J, N, D), gradient_BxSxNxD.dtype)
  return _run_exchanges(exchange, zero, plan, _varying_axes(gradient_BxSxNxD)), None


_ragged_all_gather.defvjp(_forward, _backward)


def _run_exchanges(
  exchange: Callable[[Array, Array | int, int], Array],
  initial: Array,
  plan: GatherPlan,
  axes: tuple[str, ...],
) -> Array:
  """Runs `exchange(result so far, first slot, slots)` over all slots that are in use.

  Args:
    exchange: exchanges a range of slots between all devices.
    initial: the result before the first exchange.
    plan: where the rows are.
    axes: mesh axes over which the data differ.
  """
  C, J = plan.rows.shape[2:]
  first, further = exchange_sizes(plan.slot.shape[2], C)
  result = exchange(_vary(initial, axes), 0, first)
  if first == J:
    return result
  used = jnp.where(plan.slot < J, plan.slot + 1, 0)
  # All devices take part in as many exchanges as the fullest one needs.
  most = jax.lax.pmax(_vary(used.max(), axes), axes)

  def is_left(carry: tuple[Array, Array]) -> Array:
    return carry[0] < most

  def step(carry: tuple[Array, Array]) -> tuple[Array, Array]:
    return carry[0] + further, exchange(carry[1], carry[0], further)

  return jax.lax.while_loop(is_left, step, (jnp.int32(first), result))[1]


def _varying_axes(x: Array) -> tuple[str, ...]:
  """Mesh axes over which x varies, sorted: all processes of a run must trace the same program."""
  return tuple(sorted(jax.typeof(x).manual_axis_type.varying))


def _vary(x: Array, axes: tuple[str, ...]) -> Array:
  """x, marked as varying over these mesh axes."""
  missing = tuple(axis for axis in axes if axis not in _varying_axes(x))
  return jax.lax.pcast(x, missing, to="varying") if missing else x
