"""A calibration from its rows to its result."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from dga_jax.calibration.allocation import allocate, Bounds, Scale
from dga_jax.calibration.candidates import head_costs
from dga_jax.calibration.comparison import Baseline, one_setting, sinks_and_window
from dga_jax.calibration.goal import Goal
from dga_jax.calibration.measuring import Divergence, HeadRises, Measurer, RowSet, SetLoss
from dga_jax.calibration.profile import measure_profile
from dga_jax.calibration.search import Improved, rivals, Search
from dga_jax.calibration.starts import bound_rows, make_starts, Start
from dga_jax.head_budgets import HeadBudgets, HeadSetting
from dga_jax.model import ModelConfig


class TableRow(NamedTuple):
  """Losses at one share of the cost.

  Attributes:
    share: the bound.
    cost: the cost of the allocation over dense attention's.
    full_heads: KV heads that stay full.
    predicted: the sum of the rises of the heads, each alone.
    budgets: the measured losses of the allocation.
    one_setting: the baseline `comparison.one_setting`, or None.
    sinks_and_window: the baseline `comparison.sinks_and_window`, or None.
  """

  share: float
  cost: float
  full_heads: int
  predicted: Divergence
  budgets: SetLoss
  one_setting: SetLoss | None
  sinks_and_window: SetLoss | None


class Calibration(NamedTuple):
  """The result.

  Attributes:
    budgets: the chosen setting of each KV head.
    candidates: the settings that every head was measured or estimated under.
    rises: of each head and candidate, on the calibration rows.
    scale: of the rises.
    costs: of one head under each candidate, in the unit of the objective.
    share: the cost of the budgets over dense attention's.
    starts: the sets that were compared first, and the measured score of each.
    chosen_start: the index of the start whose changes gave the budgets.
    improved: the budgets, with their score and the number of changes of all starts.
    dense: losses of dense attention on the rows of the table.
    chosen: the budgets and their baselines, on the rows of the table.
    table: rows that an allocation reaches.
  """

  budgets: HeadBudgets
  candidates: tuple[HeadSetting, ...]
  rises: HeadRises
  scale: Scale
  costs: Float[np.ndarray, "C"]
  share: float
  starts: tuple[tuple[Start, float], ...]
  chosen_start: int
  improved: Improved
  dense: SetLoss
  chosen: TableRow
  table: list[TableRow]


def calibrate(
  measurer: Measurer,
  config: ModelConfig,
  goal: Goal,
  rows: RowSet,
  check_rows: RowSet,
  known: Sequence[Start] = (),
) -> Calibration:
  """Measures the heads, allocates, improves the best allocations and compares.

  All choices follow the measured scores on the calibration rows.

  Args:
    measurer: of the model and the candidates.
    config: of the model.
    goal: of the allocation.
    rows: calibration rows; heads and changes are measured on them.
    check_rows: rows of the table; the calibration rows or held-out ones.
    known: further sets to start from, of any settings. Those above the goal's share are left out.

  Raises:
    ValueError: no candidate is cheap enough for the share.
    FloatingPointError: a loss is NaN or infinite.
  """
  grid, shape = measurer.candidates, measurer.shape
  costs = head_costs(goal.objective, grid, config, goal.length)
  bounds = Bounds(shape[1], goal.rows)
  # An impossible share fails before the measurements.
  heads = math.prod(shape)
  allocate(np.zeros((heads, len(costs))), costs, goal.share * heads * costs[0], bounds)
  rises = measure_profile(measurer, rows, goal.tail)
  search = Search(measurer, config, goal, rows, grid, rises, costs)
  damage_HxC = search.damage()
  starts = make_starts(
    grid,
    damage_HxC,
    costs,
    search.budget,
    shape,
    bounds,
    length=goal.length,
    equal_bytes=goal.objective == "bytes",
  )
  starts += [bound_rows(one, *search.own_damage(one.set), bounds) for one in known]
  starts = [start for start in starts if search.is_affordable(start.set)]
  scored = [(start, search.score(start.set)) for start in starts]
  index, best = _improve(search, scored, goal.improved)
  best = search.best_of_rivals(best)
  table = _Table(measurer, goal, search, check_rows)
  chosen_row = table.row(goal.share, best.set)
  lines = [
    table.row(share, Baseline(grid, choice_H.reshape(shape)))
    for share, choice_H in tqdm(
      _allocations(damage_HxC, costs, goal.table_shares, search.dense_cost, bounds),
      desc="table",
      unit="share",
      disable=None,
    )
  ]
  return Calibration(
    make_budgets(*best.set),
    grid,
    rises,
    search.scale,
    costs,
    chosen_row.cost,
    tuple(scored),
    index,
    best,
    table.dense,
    chosen_row,
    lines,
  )


def _improve(
  search: Search, scored: Sequence[tuple[Start, float]], count: int
) -> tuple[int, Improved]:
  """The best of the improved starts and its index; the `count` distinct starts of lowest score."""
  order = sorted(range(len(scored)), key=lambda index: scored[index][1])
  taken: dict[HeadBudgets, int] = {}
  for index in order:
    taken.setdefault(make_budgets(*scored[index][0].set), index)
  results = [
    (index, search.improve(Improved(scored[index][0].set, scored[index][1])))
    for index in list(taken.values())[:count]
  ]
  index, best = min(results, key=lambda one: one[1].score)
  tried, accepted = (
    sum(values) for values in zip(*((one.tried, one.accepted) for _, one in results), strict=True)
  )
  return index, best._replace(tried=tried, accepted=accepted)


def make_budgets(
  candidates: Sequence[HeadSetting], assignment: Int[np.ndarray, "K N"]
) -> HeadBudgets:
  """The record of an assignment, with the settings that it uses alone."""
  used = np.unique(assignment)
  return HeadBudgets(
    tuple(candidates[index] for index in used),
    tuple(map(tuple, np.searchsorted(used, assignment).tolist())),
  )


def _allocations(
  damage_HxC: np.ndarray,
  costs: np.ndarray,
  shares: Sequence[float],
  dense_cost: float,
  bounds: Bounds,
) -> list[tuple[float, Int[np.ndarray, "H"]]]:
  """The allocation at each share that the cheapest candidate reaches."""
  least = len(damage_HxC) * costs.min() / dense_cost
  return [
    (share, allocate(damage_HxC, costs, share * dense_cost, bounds))
    for share in shares
    if share >= least
  ]


class _Table:
  """Measures the rows of the table."""

  def __init__(self, measurer: Measurer, goal: Goal, search: Search, rows: RowSet) -> None:
    self._measurer, self._goal, self._search, self._rows = measurer, goal, search, rows
    self.dense = measurer.measure_set(rows, measurer.candidates, np.zeros(measurer.shape, int))

  def row(self, share: float, one: Baseline) -> TableRow:
    """The losses of a set and of its baselines."""
    length, search = self._goal.length, self._search
    search.add(setting for rival in (one, *rivals(one, length)) for setting in rival.candidates)
    own = one.indices(self._measurer.candidates)
    layer, head = np.indices(own.shape)
    text, retrieval = (rise[layer, head, own].sum() for rise in search.rises)
    return TableRow(
      share=share,
      cost=float(search.costs[own].sum() / search.dense_cost),
      full_heads=int((own == 0).sum()),
      predicted=Divergence(float(text), float(retrieval)),
      budgets=self._measurer.measure_set(self._rows, *one),
      one_setting=self._measure(one_setting(*one, length)),
      sinks_and_window=self._measure(sinks_and_window(*one, length)),
    )

  def _measure(self, baseline: Baseline | None) -> SetLoss | None:
    return None if baseline is None else self._measurer.measure_set(self._rows, *baseline)
