"""Heads of one layer by their setting: slices of the heads of each setting, and the way back.

Runs of adjacent KV heads with one setting are static slices. Where the heads of every setting are
adjacent, a class of heads is one slice and the results are concatenated without a reorder.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from dga_jax.head_budgets import HeadRow
from pallas_kernels.head_range import HeadRange


class _Run(NamedTuple):
  """Adjacent KV heads of one setting: [start, stop) of the layer, [begin, end) of their class."""

  setting: int
  start: int
  stop: int
  begin: int
  end: int


@dataclasses.dataclass(frozen=True)
class HeadClasses:
  """The KV heads of a layer, or of one device's part of them, by their setting.

  Attributes:
    row: the setting of each KV head, as an index into `HeadBudgets.settings`.
  """

  row: HeadRow

  @property
  def settings(self) -> tuple[int, ...]:
    """The settings that occur, in the order of their first heads."""
    return tuple(dict.fromkeys(self.row))

  def count(self, setting: int) -> int:
    """KV heads of a setting."""
    return self.row.count(setting)

  @property
  def are_adjacent(self) -> bool:
    """Whether the heads of every setting are adjacent."""
    return len(self._runs) == len(self.settings)

  def heads_of(self, setting: int) -> HeadRange:
    """The KV heads of a setting, whose heads are adjacent."""
    return HeadRange(self.row.index(setting), self.count(setting))

  @functools.cached_property
  def _runs(self) -> tuple[_Run, ...]:
    runs, used, start = [], dict.fromkeys(self.row, 0), 0
    for setting, heads in itertools.groupby(self.row):
      length, begin = len(list(heads)), used[setting]
      runs.append(_Run(setting, start, start + length, begin, begin + length))
      used[setting] = begin + length
      start += length
    return tuple(runs)

  def take(self, x: Shaped[Array, "... heads D"], setting: int) -> Shaped[Array, "... some D"]:
    """The heads of one setting.

    Args:
      x: query heads or KV heads on the last axis but one. Query heads follow their KV head.
      setting: one of `settings`.
    """
    ratio = x.shape[-2] // len(self.row)
    parts = [
      x[..., run.start * ratio : run.stop * ratio, :]
      for run in self._runs
      if run.setting == setting
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-2)

  def join(self, parts: Sequence[Shaped[Array, "... _ D"]]) -> Shaped[Array, "... heads D"]:
    """The inverse of `take`.

    Args:
      parts: the heads of each of `settings`, in that order.
    """
    of_setting = dict(zip(self.settings, parts, strict=True))
    ratio = sum(part.shape[-2] for part in parts) // len(self.row)
    ordered = [
      of_setting[run.setting][..., run.begin * ratio : run.end * ratio, :] for run in self._runs
    ]
    return ordered[0] if len(ordered) == 1 else jnp.concatenate(ordered, axis=-2)

  def map(
    self, function: Callable[..., Array], *arrays: Shaped[Array, "..."]
  ) -> Shaped[Array, "..."]:
    """Calls function(setting, *heads of that setting) for every setting; joins the results.

    Args:
      function: takes and returns [..., heads, D].
      arrays: [..., heads, D], query heads or KV heads.
    """
    return self.join(
      [function(setting, *(self.take(x, setting) for x in arrays)) for setting in self.settings]
    )


def switch_rows(
  rows: Sequence[HeadRow], index: Int[Array, ""] | int, function: Callable[..., Any], *args: Any
) -> Any:
  """function(row, *args) with row = rows[index]: one branch for each distinct row.

  Args:
    rows: settings of the KV heads, for every value of the index.
    index: which of the rows; may be traced.
    function: takes a static row.
    args: pytrees of arrays.
  """
  distinct = tuple(dict.fromkeys(rows))
  if len(distinct) == 1:
    return function(distinct[0], *args)
  if isinstance(index, int | np.integer):
    return function(rows[index], *args)
  table = jnp.asarray([distinct.index(row) for row in rows], jnp.int32)
  branches = [functools.partial(function, row) for row in distinct]
  return jax.lax.switch(table[index], branches, *args)
