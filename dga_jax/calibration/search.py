"""Sets within the bounds of a goal: their costs, their measured scores, and changes of them."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from dga_jax.calibration.allocation import Bounds, ROUNDING, Scale, with_prior
from dga_jax.calibration.candidates import head_costs
from dga_jax.calibration.comparison import Baseline, one_setting, sinks_and_window
from dga_jax.calibration.correction import correct
from dga_jax.calibration.goal import Goal
from dga_jax.calibration.measuring import HeadRises, Measurer, RowSet
from dga_jax.calibration.profile import find_bulk, measure_beside, rise_of
from dga_jax.calibration.resizing import resize_windows
from dga_jax.head_budgets import HeadSetting
from dga_jax.model import ModelConfig


class Improved(NamedTuple):
  """A set and its measured score; lower is better.

  Attributes:
    set: the settings, and the setting of each KV head.
    score: see `Scale.score`.
    tried: changes that were measured.
    accepted: changes that lowered the score.
  """

  set: Baseline
  score: float
  tried: int = 0
  accepted: int = 0


class Search:
  """Scores and improves sets of any settings.

  Args:
    measurer: of the model.
    config: of the model.
    goal: of the allocation.
    rows: calibration rows.
    grid: the candidates that `rises` has.
    rises: of each head and candidate.
    costs: of one head under each candidate.

  Attributes:
    scale: of the rises.
    bounds: on settings and rows.
    dense_cost: of all heads under dense attention.
    costs: of one head under each candidate of the measurer.
    rises: of each head under each candidate of the measurer; interpolated outside the grid.
  """

  def __init__(
    self,
    measurer: Measurer,
    config: ModelConfig,
    goal: Goal,
    rows: RowSet,
    grid: tuple[HeadSetting, ...],
    rises: HeadRises,
    costs: Float[np.ndarray, "C"],
  ) -> None:
    self._measurer, self._config, self._goal, self._rows = measurer, config, goal, rows
    self._grid, self._grid_rises = grid, rises
    self._settings = grid
    self._is_bulk: Bool[np.ndarray, "K N"] = find_bulk(rises, goal.tail)
    self.scale = Scale.from_rises(rises)
    self.bounds = Bounds(measurer.shape[1], goal.rows)
    self.dense_cost = math.prod(measurer.shape) * float(costs[0])
    self.costs, self.rises = costs, rises

  @property
  def budget(self) -> float:
    """Bound on the cost of a set."""
    return self._goal.share * self.dense_cost

  def add(self, settings: Iterable[HeadSetting]) -> None:
    """Adds settings to the candidates of the measurer, with their costs and estimated rises."""
    self._measurer.add_candidates(settings)
    every, length = self._measurer.candidates, self._goal.length
    new = every[len(self._settings) :]
    if new:
      added = head_costs(self._goal.objective, new, self._config, length)
      self.costs, self._settings = np.concatenate([self.costs, added]), every
      self.rises = HeadRises(
        *(
          np.stack([rise_of(one, self._grid, rise, length) for one in every], axis=-1)
          for rise in self._grid_rises
        )
      )

  def damage(self) -> Float[np.ndarray, "H S"]:
    """The predicted damage of each head under each candidate of the measurer."""
    damage_KxNxS = self.scale.damage(self.rises)
    return with_prior(damage_KxNxS.reshape(-1, damage_KxNxS.shape[-1]), self.costs)

  def own_damage(self, one: Baseline) -> tuple[Float[np.ndarray, "H C"], Float[np.ndarray, "C"]]:
    """Predicted damages and costs under the settings of a set, which are added."""
    self.add(one.candidates)
    columns = [self._settings.index(setting) for setting in one.candidates]
    return self.damage()[:, columns], self.costs[columns]

  def is_affordable(self, one: Baseline) -> bool:
    """Whether the cost of a set is within the goal's share; its settings are added."""
    self.add(one.candidates)
    own = self.costs[one.indices(self._settings)]
    return bool(own.sum() <= self.budget * (1 + ROUNDING))

  def score(self, one: Baseline) -> float:
    """The measured damage of a set; its settings are added."""
    self.add(one.candidates)
    return self.scale.score(self._measurer.rise_of_set(self._rows, *one))

  def improve(self, start: Improved) -> Improved:
    """A set with its changes that lower the measured score; see `correct` and `resize_windows`.

    After another window, other heads are the best ones to change.
    """
    best = self._resize(self._correct(start))
    if best.score < start.score:
      best = self._resize(self._correct(best))
    return best

  def best_of_rivals(self, own: Improved) -> Improved:
    """The set or a baseline of equal bytes, whichever measures better."""
    if self._goal.objective != "bytes":
      return own
    best = own
    for rival in rivals(own.set, self._goal.length):
      if self.is_affordable(rival) and (score := self.score(rival)) < best.score:
        best = own._replace(set=rival, score=score)
    return best

  def _correct(self, start: Improved) -> Improved:
    self.add(start.set.candidates)
    shape, settings = self._measurer.shape, self._settings
    damage_HxS = self.damage()

    def damage_beside(choice_H: Int[np.ndarray, "H"]) -> Float[np.ndarray, "H S"]:
      """The heads of the tail keep their predicted damages."""
      base_KxN, used = choice_H.reshape(shape), np.unique(choice_H)
      wanted = np.zeros((*shape, len(settings)), bool)
      wanted[..., used] = self._is_bulk[..., None]
      rises = measure_beside(
        self._measurer, self._rows, wanted, base_KxN, "heads beside the best set"
      )
      beside_KxNxS = rises.text / self.scale.text + rises.retrieval / self.scale.retrieval
      beside_HxS = beside_KxNxS.reshape(damage_HxS.shape)
      alone_HxS = damage_HxS - np.take_along_axis(damage_HxS, choice_H[:, None], axis=1)
      known_HxS = np.where(self._is_bulk.reshape(-1, 1), beside_HxS, alone_HxS)
      return np.where(np.isin(np.arange(len(settings)), used)[None], known_HxS, np.inf)

    with tqdm(desc="sets", unit="set", disable=None) as bar:

      def measure(choice_H: Int[np.ndarray, "H"]) -> float:
        bar.update()
        return self.score(Baseline(settings, choice_H.reshape(shape)))

      corrected = correct(
        start.set.indices(settings).ravel(),
        start.score,
        damage_HxS,
        self.costs,
        self.budget,
        self.bounds,
        measure=measure,
        rounds=self._goal.rounds,
        measure_beside=damage_beside,
        refinements=self._goal.refinements,
      )
    choice_H, score, tried, accepted = corrected
    changed = Baseline(settings, choice_H.reshape(shape))
    return Improved(changed, score, start.tried + tried, start.accepted + accepted)

  def _resize(self, start: Improved) -> Improved:
    """`resize_windows` within the goal's share; only bytes are counted."""
    if self._goal.objective != "bytes":
      return start
    with tqdm(desc="windows", unit="set", disable=None) as bar:

      def measure(one: Baseline) -> float:
        bar.update()
        return self.score(one) if self.is_affordable(one) else math.inf

      keys = int(self._goal.share * math.prod(self._measurer.shape) * self._goal.length)
      resized, score = resize_windows(
        start.set, start.score, keys=keys, length=self._goal.length, measure=measure
      )
    return start._replace(set=resized, score=score)


def rivals(one: Baseline, length: int) -> list[Baseline]:
  """The baselines of a set: one setting in all heads; the same full heads, sinks and a window."""
  both = (one_setting(*one, length), sinks_and_window(*one, length))
  return [rival for rival in both if rival is not None]
