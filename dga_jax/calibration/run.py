"""A calibration from its rows to its result."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from dga_jax.calibration.allocation import allocate, ROUNDING, Scale, with_prior
from dga_jax.calibration.candidates import head_costs, Objective
from dga_jax.calibration.comparison import Baseline, one_setting, sinks_and_window
from dga_jax.calibration.correction import correct, Corrected
from dga_jax.calibration.measuring import Divergence, HeadRises, Measurer, RowSet, SetLoss
from dga_jax.calibration.profile import measure_beside, measure_profile, rise_of
from dga_jax.calibration.resizing import resize_windows
from dga_jax.calibration.starts import make_starts, SOLVER, Start
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
    refinements: most passes in which all heads are measured again beside the best set.
    table_shares: shares of the table of predicted and measured losses.
  """

  share: float
  objective: Objective
  length: int
  tail: float
  rounds: int
  refinements: int
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
    starts: the allocations from which the correction chose its start.
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
  starts: tuple[Start, ...]
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
  grid, shape = measurer.candidates, measurer.shape
  costs = head_costs(goal.objective, grid, config, goal.length)
  dense_cost = math.prod(shape) * costs[0]
  # An impossible share fails before the measurements.
  allocate(np.zeros((math.prod(shape), len(costs))), costs, goal.share * dense_cost)
  rises = measure_profile(measurer, rows, goal.tail)
  scale = Scale.from_rises(rises)
  damage_HxC = with_prior(scale.damage(rises).reshape(-1, len(costs)), costs)
  starts = make_starts(
    grid,
    damage_HxC,
    costs,
    goal.share * dense_cost,
    shape,
    length=goal.length,
    equal_bytes=goal.objective == "bytes",
  )
  allocations = _allocations(damage_HxC, costs, goal.table_shares, dense_cost)
  sets = [Baseline(grid, choice_H.reshape(shape)) for _, choice_H in allocations]
  rivals = [rival for one in sets for rival in _rivals(one, goal.length)]
  known = [start.set for start in starts] + rivals
  measurer.add_candidates(setting for one in known for setting in one.candidates)
  estimates = _Estimates(config, goal, grid, rises, costs)
  estimates.extend(measurer.candidates)
  starts = [start for start in starts if estimates.is_affordable(start.set)]
  corrected = _correct(measurer, goal, scale, estimates, [start.set for start in starts], rows)
  if corrected.start != 0 and starts[0].name == SOLVER:
    # The solver's set has more settings than the others, and more to gain from a correction.
    corrected = corrected.best(
      _correct(measurer, goal, scale, estimates, [starts[0].set], rows), start=0
    )
  own = Baseline(measurer.candidates, corrected.choice.reshape(measurer.shape))
  resized, score = _resize(measurer, goal, scale, estimates, own, corrected.score, rows)
  if score < corrected.score:
    # Other windows make other heads the best ones to change.
    corrected = corrected.best(
      _correct(measurer, goal, scale, estimates, [resized], rows), start=corrected.start
    )
    own = Baseline(measurer.candidates, corrected.choice.reshape(measurer.shape))
    resized, score = _resize(measurer, goal, scale, estimates, own, corrected.score, rows)
  chosen, score = _best_of_rivals(measurer, goal, scale, estimates, resized, score, rows)
  measurer.add_candidates(one for rival in _rivals(chosen, goal.length) for one in rival.candidates)
  estimates.extend(measurer.candidates)
  corrected = corrected._replace(choice=chosen.indices(measurer.candidates).ravel(), score=score)
  table = _Table(measurer, goal, estimates, check_rows)
  chosen_row = table.row(goal.share, chosen)
  lines = [
    table.row(share, one)
    for (share, _), one in tqdm(
      list(zip(allocations, sets, strict=True)), desc="table", unit="share", disable=None
    )
  ]
  return Calibration(
    make_budgets(*chosen),
    grid,
    rises,
    scale,
    costs,
    chosen_row.cost,
    tuple(starts),
    corrected,
    table.dense,
    chosen_row,
    lines,
  )


def _rivals(one: Baseline, length: int) -> list[Baseline]:
  """The baselines of a set: one setting in all heads; the same full heads, sinks and a window."""
  both = (one_setting(*one, length), sinks_and_window(*one, length))
  return [rival for rival in both if rival is not None]


class _Estimates:
  """Costs, and rises of single heads, of the grid and of further settings.

  Attributes:
    costs: of one head under each setting.
    rises: of each head; interpolated for settings outside the grid.
  """

  def __init__(
    self,
    config: ModelConfig,
    goal: Goal,
    grid: tuple[HeadSetting, ...],
    rises: HeadRises,
    costs: Float[np.ndarray, "C"],
  ) -> None:
    self._config, self._goal, self._grid, self._grid_rises = config, goal, grid, rises
    self._settings = grid
    self.costs, self.rises = costs, rises

  def is_affordable(self, one: Baseline) -> bool:
    """Whether the cost of a set of estimated settings is within the goal's share."""
    own = self.costs[one.indices(self._settings)]
    return bool(own.sum() <= self._goal.share * own.size * self.costs[0] * (1 + ROUNDING))

  def extend(self, settings: Sequence[HeadSetting]) -> None:
    """Estimates settings, of which the first are those that have estimates."""
    new, self._settings = settings[len(self.costs) :], tuple(settings)
    if new:
      added = head_costs(self._goal.objective, new, self._config, self._goal.length)
      self.costs = np.concatenate([self.costs, added])
    length = self._goal.length
    self.rises = HeadRises(
      *(
        np.stack([rise_of(one, self._grid, rise, length) for one in settings], axis=-1)
        for rise in self._grid_rises
      )
    )


def _correct(
  measurer: Measurer,
  goal: Goal,
  scale: Scale,
  estimates: _Estimates,
  starts: Sequence[Baseline],
  rows: RowSet,
) -> Corrected:
  """The best start, corrected on the calibration rows."""
  shape, settings, costs = measurer.shape, measurer.candidates, estimates.costs
  damage_HxS = with_prior(scale.damage(estimates.rises).reshape(-1, len(settings)), costs)

  def damage_beside(choice_H: Int[np.ndarray, "H"]) -> Float[np.ndarray, "H S"]:
    wanted = np.zeros((*shape, len(settings)), bool)
    wanted[..., np.unique(choice_H)] = True
    base = choice_H.reshape(shape)
    rises = measure_beside(measurer, rows, wanted, base, "all heads, beside the best set")
    damage_KxNxS = rises.text / scale.text + rises.retrieval / scale.retrieval
    return np.where(np.isnan(damage_KxNxS), np.inf, damage_KxNxS).reshape(damage_HxS.shape)

  with tqdm(desc="sets", unit="set", disable=None) as bar:

    def score(choice_H: Int[np.ndarray, "H"]) -> float:
      measured = _score(measurer, scale, Baseline(settings, choice_H.reshape(shape)), rows)
      bar.update()
      return measured

    return correct(
      [start.indices(settings).ravel() for start in starts],
      damage_HxS,
      costs,
      goal.share * len(damage_HxS) * float(costs[0]),
      measure=score,
      rounds=goal.rounds,
      measure_beside=damage_beside,
      refinements=goal.refinements,
    )


def _resize(
  measurer: Measurer,
  goal: Goal,
  scale: Scale,
  estimates: _Estimates,
  one: Baseline,
  score: float,
  rows: RowSet,
) -> tuple[Baseline, float]:
  """`resize_windows` within the goal's share, with a progress bar; only bytes are counted."""
  if goal.objective != "bytes":
    return one, score
  with tqdm(desc="windows", unit="set", disable=None) as bar:

    def measure(one: Baseline) -> float:
      measurer.add_candidates(one.candidates)
      estimates.extend(measurer.candidates)
      bar.update()
      return _score(measurer, scale, one, rows) if estimates.is_affordable(one) else math.inf

    keys = int(goal.share * math.prod(measurer.shape) * goal.length)
    return resize_windows(one, score, keys=keys, length=goal.length, measure=measure)


def _best_of_rivals(
  measurer: Measurer,
  goal: Goal,
  scale: Scale,
  estimates: _Estimates,
  own: Baseline,
  score: float,
  rows: RowSet,
) -> tuple[Baseline, float]:
  """The set or a baseline of equal bytes, whichever measures better, and its score."""
  best = own
  if goal.objective != "bytes":
    return best, score
  for rival in _rivals(own, goal.length):
    measurer.add_candidates(rival.candidates)
    estimates.extend(measurer.candidates)
    if not estimates.is_affordable(rival):
      continue
    measured = _score(measurer, scale, rival, rows)
    if measured < score:
      best, score = rival, measured
  return best, score


def _score(measurer: Measurer, scale: Scale, one: Baseline, rows: RowSet) -> float:
  """The measured damage of a set."""
  return scale.score(measurer.measure_set(rows, *one))


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
  """Measures the rows of the table; the measurer's candidates are those of all sets."""

  def __init__(self, measurer: Measurer, goal: Goal, estimates: _Estimates, rows: RowSet) -> None:
    self._measurer, self._goal = measurer, goal
    self._estimates, self._rows = estimates, rows
    self.dense = measurer.measure_set(rows, measurer.candidates, np.zeros(measurer.shape, int))

  def row(self, share: float, one: Baseline) -> TableRow:
    """The losses of a set and of its baselines."""
    own = one.indices(self._measurer.candidates)
    layer, head = np.indices(own.shape)
    text, retrieval = (rise[layer, head, own].sum() for rise in self._estimates.rises)
    costs, length = self._estimates.costs, self._goal.length
    return TableRow(
      share=share,
      cost=float(costs[own].sum() / (costs[0] * own.size)),
      full_heads=int((own == 0).sum()),
      predicted=Divergence(float(text), float(retrieval)),
      budgets=self._measurer.measure_set(self._rows, *one),
      one_setting=self._measure(one_setting(*one, length)),
      sinks_and_window=self._measure(sinks_and_window(*one, length)),
    )

  def _measure(self, baseline: Baseline | None) -> SetLoss | None:
    return None if baseline is None else self._measurer.measure_set(self._rows, *baseline)
