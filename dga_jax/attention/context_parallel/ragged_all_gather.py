"""Gathering lists of which each device holds an uneven part, without sending the worst case."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gather import take_rows

# Of an even part: how much more the first exchange holds, and how much each further one does.
_SLACK = 1 / 20
_FURTHER = 1 / 4


class GatherPlan(NamedTuple):
  """Who holds the entries of a list of S entries, the same on every device of the axis.

  J, from `places`, bounds the entries of one device.
  """

  device: Int[Array, "B N S"]  # which device holds an entry, any for an entry that none holds
  rank: Int[Array, "B N S"]  # its place on that device, J for an entry that none holds
  slots: Int[Array, "B N C J"]  # entry at each place of each device, S for none


def places(entries: int, devices: int, most: int) -> int:
  """J for a list of so many entries, of which one device holds `most` at the most."""
  first, further = _sizes(entries, devices)
  return first + max(0, math.ceil((most - first) / further)) * further


def collect(
  rows_BxJxNxD: Float[Array, "B J N D"], holders: GatherPlan, axis_name: str
) -> Float[Array, "B S N D"]:
  """The whole list on every device, of the rows that each holds; zeros for what none holds.

  A first exchange takes a little more than an even part from every device, and is all where the
  entries are spread evenly. Where they crowd, further and smaller ones follow until no device has
  any left. The gradient takes the same way back, summed over the devices.

  Args:
    rows_BxJxNxD: this device's rows, at their places.
    holders: who holds what.
    axis_name: of the devices.
  """
  return _collect(axis_name, rows_BxJxNxD, holders)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _collect(axis_name: str, rows_BxJxNxD: Array, holders: GatherPlan) -> Array:
  B, _, N, D = rows_BxJxNxD.shape

  def exchange(list_BxSxNxD: Array, first: Array | int, size: int) -> Array:
    part_BxjxNxD = jax.lax.dynamic_slice_in_dim(rows_BxJxNxD, first, size, axis=1)
    every_BxCjxNxD = jax.lax.all_gather(part_BxjxNxD, axis_name, axis=1, tiled=True)
    inside = holders.rank - first
    here = (inside >= 0) & (inside < size)
    place = jnp.where(here, holders.device * size + inside, every_BxCjxNxD.shape[1])
    return list_BxSxNxD + take_rows(every_BxCjxNxD, place)

  entries = holders.rank.shape[2]
  nothing = jnp.zeros((B, entries, N, D), rows_BxJxNxD.dtype)
  return _exchanges(exchange, nothing, holders, _varying_axes(rows_BxJxNxD))


def _forward(axis_name: str, rows_BxJxNxD: Array, holders: GatherPlan) -> tuple[Array, GatherPlan]:
  return _collect(axis_name, rows_BxJxNxD, holders), holders


def _backward(
  axis_name: str, holders: GatherPlan, gradient_BxSxNxD: Array
) -> tuple[Array, GatherPlan | None]:
  B, _, N, D = gradient_BxSxNxD.shape
  C, J = holders.slots.shape[2:]

  def exchange(rows_BxJxNxD: Array, first: Array | int, size: int) -> Array:
    slots = jax.lax.dynamic_slice_in_dim(holders.slots, first, size, axis=3)
    parts_BxCjxNxD = take_rows(gradient_BxSxNxD, slots.reshape(B, N, C * size))
    part_BxjxNxD = jax.lax.psum_scatter(parts_BxCjxNxD, axis_name, scatter_dimension=1, tiled=True)
    return jax.lax.dynamic_update_slice_in_dim(rows_BxJxNxD, part_BxjxNxD, first, axis=1)

  nothing = jnp.zeros((B, J, N, D), gradient_BxSxNxD.dtype)
  return _exchanges(exchange, nothing, holders, _varying_axes(gradient_BxSxNxD)), None


_collect.defvjp(_forward, _backward)


def _exchanges(
  exchange: Callable[[Array, Array | int, int], Array],
  nothing: Array,
  holders: GatherPlan,
  axes: tuple[str, ...],
) -> Array:
  """What `exchange(so far, first place, places)` makes of all places that are in use.

  Args:
    exchange: one of the exchanges.
    nothing: what it begins with.
    holders: who holds what.
    axes: mesh axes over which the data differ.
  """
  C, J = holders.slots.shape[2:]
  first, further = _sizes(holders.rank.shape[2], C)
  made = exchange(_vary(nothing, axes), 0, first)
  if first == J:
    return made
  held = jnp.where(holders.rank < J, holders.rank + 1, 0)
  # All devices take part in as many exchanges as the one that has most to send.
  most = jax.lax.pmax(_vary(held.max(), axes), axes)

  def more(carry: tuple[Array, Array]) -> Array:
    return carry[0] < most

  def step(carry: tuple[Array, Array]) -> tuple[Array, Array]:
    return carry[0] + further, exchange(carry[1], carry[0], further)

  return jax.lax.while_loop(more, step, (jnp.int32(first), made))[1]


def _sizes(entries: int, devices: int) -> tuple[int, int]:
  even = entries / devices
  return max(1, math.ceil(even * (1 + _SLACK))), max(1, math.ceil(even * _FURTHER))


def _varying_axes(x: Array) -> tuple[str, ...]:
  return tuple(jax.typeof(x).manual_axis_type.varying)


def _vary(x: Array, axes: tuple[str, ...]) -> Array:
  """x, marked as varying over these mesh axes."""
  missing = tuple(axis for axis in axes if axis not in _varying_axes(x))
  return jax.lax.pcast(x, missing, to="varying") if missing else x
