"""A calibration from its rows to its result."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from dga_jax.calibration.allocation import allocate, Scale, with_prior
from dga_jax.calibration.candidates import head_costs, Objective
from dga_jax.calibration.comparison import Baseline, one_setting, sinks_and_window
from dga_jax.calibration.correction import correct, Corrected
from dga_jax.calibration.measuring import HeadRises, Measurer, RowSet, SetLoss
from dga_jax.calibration.profile import measure_profile
from dga_jax.head_budgets import HeadBudgets, HeadSetting
from dga_jax.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Goal:
  """What the allocation is for.

  Attributes:
    share: bound on the cost, as a share of the cost of dense attention, above 0 and at most 1.
    objective: the cost.
    length: L, tokens of the context.
    tail: see `profile.measure_profile`.
    rounds: largest number of measured swaps.
    table_shares: shares of the table of predicted and measured losses.
  """

  share: float
  objective: Objective
  length: int
  tail: float
  rounds: int
  table_shares: tuple[float, ...]

  def __post_init__(self) -> None:
    for share in (self.share, *self.table_shares):
      if not 0 < share <= 1:
        raise ValueError(f"a share of the dense cost is {share}; it must be above 0, at most 1.")


class TableRow(NamedTuple):
  """Losses at one share of the cost.

  Attributes:
    share: the bound.
    cost: the cost of the allocation over dense attention's.
    full_heads: KV heads that stay full.
    predicted: (text, retrieval): the dense loss and the sum of the heads' rises.
    budgets: the measured losses of the allocation.
    one_setting: the baseline `comparison.one_setting`, or None.
    sinks_and_window: the baseline `comparison.sinks_and_window`, or None.
  """

  share: float
  cost: float
  full_heads: int
  predicted: tuple[float, float]
  budgets: SetLoss
  one_setting: SetLoss | None
  sinks_and_window: SetLoss | None


class Calibration(NamedTuple):
  """The result.

  Attributes:
    budgets: the chosen setting of each KV head.
    candidates: the settings that were measured.
    rises: of each head and candidate, on the calibration rows.
    scale: of the rises.
    costs: of one head under each candidate, in the unit of the objective.
    share: the cost of the budgets over dense attention's.
    corrected: the local correction.
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
  corrected: Corrected
  dense: SetLoss
  chosen: TableRow
  table: list[TableRow]


def calibrate(
  measurer: Measurer, config: ModelConfig, goal: Goal, rows: RowSet, check_rows: RowSet
) -> Calibration:
  """Measures the heads, allocates, corrects the allocation and compares.

  Args:
    measurer: of the model and the candidates.
    config: of the model.
    goal: of the allocation.
    rows: calibration rows; heads and swaps are measured on them.
    check_rows: rows of the table; the calibration rows or held-out ones.

  Raises:
    ValueError: no candidate is cheap enough for the share.
    FloatingPointError: a loss is NaN or infinite.
  """
  costs = head_costs(goal.objective, measurer.candidates, config, goal.length)
  shape = measurer.shape
  dense_cost = math.prod(shape) * costs[0]
  # An impossible share fails before the measurements.
  allocate(np.zeros((math.prod(shape), len(costs))), costs, goal.share * dense_cost)
  rises = measure_profile(measurer, rows, goal.tail)
  scale = Scale.from_rises(rises)
  damage_HxC = with_prior(scale.damage(rises).reshape(-1, len(costs)), costs)
  corrected = _correct(measurer, goal, scale, damage_HxC, costs, rows)
  table = _Table(measurer, goal, rises, costs, check_rows)
  chosen = table.row(goal.share, corrected.choice.reshape(shape))
  allocations = _allocations(damage_HxC, costs, goal.table_shares, dense_cost)
  lines = [
    table.row(share, choice_H.reshape(shape))
    for share, choice_H in tqdm(allocations, desc="table", unit="share", disable=None)
  ]
  return Calibration(
    make_budgets(measurer.candidates, corrected.choice.reshape(shape)),
    measurer.candidates,
    rises,
    scale,
    costs,
    chosen.cost,
    corrected,
    table.dense,
    chosen,
    lines,
  )


def _correct(
  measurer: Measurer,
  goal: Goal,
  scale: Scale,
  damage_HxC: Float[np.ndarray, "H C"],
  costs: Float[np.ndarray, "C"],
  rows: RowSet,
) -> Corrected:
  """The allocation at the goal's share, corrected on the calibration rows."""
  shape, candidates = measurer.shape, measurer.candidates
  dense = measurer.measure_set(rows, candidates, np.zeros(shape, int))
  budget = goal.share * len(damage_HxC) * costs[0]
  with tqdm(total=goal.rounds + 1, desc="swaps", unit="set", disable=None) as bar:

    def score(choice_H: Int[np.ndarray, "H"]) -> float:
      measured = measurer.measure_set(rows, candidates, choice_H.reshape(shape))
      bar.update()
      return scale.score(measured, dense)

    first_H = allocate(damage_HxC, costs, budget)
    return correct(first_H, damage_HxC, costs, budget, measure=score, rounds=goal.rounds)


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
  damage_HxC: np.ndarray, costs: np.ndarray, shares: Sequence[float], dense_cost: float
) -> list[tuple[float, Int[np.ndarray, "H"]]]:
  """The allocation at each share that the cheapest candidate reaches."""
  least = len(damage_HxC) * costs.min() / dense_cost
  return [
    (share, allocate(damage_HxC, costs, share * dense_cost)) for share in shares if share >= least
  ]


class _Table:
  """Measures the rows of the table."""

  def __init__(
    self,
    measurer: Measurer,
    goal: Goal,
    rises: HeadRises,
    costs: Float[np.ndarray, "C"],
    rows: RowSet,
  ) -> None:
    self._measurer, self._goal, self._rises = measurer, goal, rises
    self._costs, self._rows = costs, rows
    shape = rises.text.shape[:2]
    self.dense = measurer.measure_set(rows, measurer.candidates, np.zeros(shape, int))

  def row(self, share: float, assignment: Int[np.ndarray, "K N"]) -> TableRow:
    candidates, length = self._measurer.candidates, self._goal.length
    layer, head = np.indices(assignment.shape)
    text, retrieval = (rise[layer, head, assignment].sum() for rise in self._rises)
    return TableRow(
      share=share,
      cost=float(self._costs[assignment].sum() / (self._costs[0] * assignment.size)),
      full_heads=int((assignment == 0).sum()),
      predicted=(self.dense.text + float(text), self.dense.retrieval + float(retrieval)),
      budgets=self._measurer.measure_set(self._rows, candidates, assignment),
      one_setting=self._measure(one_setting(candidates, assignment, length)),
      sinks_and_window=self._measure(sinks_and_window(candidates, assignment, length)),
    )

  def _measure(self, baseline: Baseline | None) -> SetLoss | None:
    if baseline is None:
      return None
    return self._measurer.measure_set(self._rows, baseline.candidates, baseline.assignment)
