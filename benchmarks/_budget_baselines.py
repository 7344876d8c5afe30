"""Sets of head budgets and their baselines with the same bytes, and bootstrap intervals."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dga_jax.calibration.comparison import (
  Baseline,
  one_setting,
  scale_windows,
  sinks_and_window,
  spread_window,
)
from dga_jax.calibration.run import make_budgets
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import HeadBudgets, SinkWindow
from dga_jax.model import ModelConfig

BASELINES = ("same full heads", "sinks and window", "one window", "one DGA setting")
_BOOTSTRAP = 2000


class Set(NamedTuple):
  """Budgets or a baseline.

  Attributes:
    file: the name of the file of budgets; "" for dense attention.
    kind: "dense", "budgets" or a baseline.
    budgets: the setting of each KV head.
    length: that the budgets were calibrated for.
  """

  file: str
  kind: str
  budgets: HeadBudgets
  length: int

  def share(self, length: int) -> float:
    """Keys in the cache over all keys."""
    return as_baseline(self.budgets).share(length)

  def scaled_to(self, length: int) -> "Set":
    """The set with windows for another length."""
    scaled = scale_windows(as_baseline(self.budgets), length / self.length)
    return self._replace(budgets=make_budgets(*scaled), length=length)


def make_baselines(
  budgets: HeadBudgets, stored: dict[str, Any], config: ModelConfig
) -> Iterator[tuple[str, HeadBudgets | None]]:
  """The baselines with at most the keys of the budgets; None for one that its keys do not reach.

  Args:
    budgets: calibrated.
    stored: "length" and "starts" of their calibration.
    config: of the model.
  """
  own, length = as_baseline(budgets), stored["length"]
  keys = round(own.share(length) * length * own.assignment.size)
  no_full_head = np.zeros(own.assignment.shape, bool)
  blocks = DGAConfig(
    selection="streaming",
    selector="fitted" if config.focal_selector else "last_query",
    group_size=30,
    focal_per_block=2,
    sink_tokens=4,
  )
  duo = [one for one in stored["starts"] if one["name"].endswith("full heads, sinks and window")]
  best = min(duo, key=lambda one: one["score"], default=None)
  with_sinks = (*own.candidates, SinkWindow(1, 4))
  yield BASELINES[0], _optional(sinks_and_window(with_sinks, own.assignment, length))
  yield BASELINES[1], None if best is None else HeadBudgets.from_dict(best["budgets"])
  yield BASELINES[2], _optional(spread_window(no_full_head, keys, 4, length))
  yield BASELINES[3], _optional(one_setting((*own.candidates, blocks), own.assignment, length))


def interval(cells: Sequence[np.ndarray], seed: int) -> np.ndarray:
  """The interval of 95 % of bootstrap samples of the mean over cells of the means of their values.

  Args:
    cells: numbers that are drawn with replacement within their cell.
    seed: of the draws.
  """
  rng = np.random.default_rng(seed)
  means = [rng.choice(cell, (_BOOTSTRAP, len(cell))).mean(axis=1) for cell in cells]
  return np.quantile(np.mean(means, axis=0), [0.025, 0.975])


def as_baseline(budgets: HeadBudgets) -> Baseline:
  """The budgets in the form of the calibration."""
  return Baseline(budgets.settings, np.array(budgets.assignment))


def _optional(one: Baseline | None) -> HeadBudgets | None:
  return None if one is None else make_budgets(*one)
