"""The lengths of sliding windows of a set, adjusted by measuring at equal cost.

The windows of the grid are few. Between them the best lengths of a set are found by moving bytes
from one window to another, with the heads of each setting unchanged.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from dga_jax.calibration.comparison import Baseline
from dga_jax.head_budgets import HeadSetting, SinkWindow
from dga_jax.model.flops import setting_keys

_FACTORS = (1.5, 1.2)


def resize_windows(
  one: Baseline,
  score: float,
  *,
  keys: int,
  length: int,
  measure: Callable[[Baseline], float],
) -> tuple[Baseline, float]:
  """The set with the lengths of its sliding windows that measure best, and its score.

  First each window alone takes the keys that the set leaves of the budget. Then a window grows by
  half, later by a fifth, and another pays for it. A change that lowers the score is kept.

  Args:
    one: the set.
    score: its measured score; lower is better.
    keys: the most keys that all heads may keep together.
    length: L, tokens of the context.
    measure: the score of a set.
  """
  one = _without_unused(one)
  for grown in _windows(one):
    one, score = _better(one, score, _pay(one, grown, grown, keys, length), measure)
  for factor in _FACTORS:
    for grown, paying in itertools.permutations(_windows(one), 2):
      setting = one.candidates[grown]
      assert isinstance(setting, SinkWindow)
      longer = _replace(one, grown, max(setting.window + 1, round(factor * setting.window)))
      one, score = _better(one, score, _pay(longer, paying, grown, keys, length), measure)
  return one, score


def _better(
  one: Baseline, score: float, other: Baseline | None, measure: Callable[[Baseline], float]
) -> tuple[Baseline, float]:
  if other is None or other.candidates == one.candidates:
    return one, score
  measured = measure(other)
  return (other, measured) if measured < score else (one, score)


def _pay(one: Baseline, paying: int, grown: int, keys: int, length: int) -> Baseline | None:
  """The set whose window `paying` has the length at which all keys are used; None if there is none.

  A window must stay shorter than the context, and settings must stay distinct.
  """
  counts = np.bincount(one.assignment.ravel(), minlength=len(one.candidates))
  others = sum(
    int(count) * setting_keys(setting, length)
    for index, (setting, count) in enumerate(zip(one.candidates, counts, strict=True))
    if index != paying
  )
  setting, long = one.candidates[paying], one.candidates[grown]
  assert isinstance(setting, SinkWindow)
  assert isinstance(long, SinkWindow)
  window = (keys - others) // int(counts[paying]) - setting.sinks
  if window < 1 or max(window + setting.sinks, long.window + long.sinks) >= length:
    return None
  changed = _replace(one, paying, window)
  return changed if len(set(changed.candidates)) == len(changed.candidates) else None


def _replace(one: Baseline, index: int, window: int) -> Baseline:
  settings: list[HeadSetting] = list(one.candidates)
  setting = settings[index]
  assert isinstance(setting, SinkWindow)
  settings[index] = SinkWindow(window, setting.sinks)
  return one._replace(candidates=tuple(settings))


def _windows(one: Baseline) -> Iterator[int]:
  """The sliding windows of a set, the longest first."""
  found = [i for i, setting in enumerate(one.candidates) if isinstance(setting, SinkWindow)]
  return iter(sorted(found, key=lambda i: -getattr(one.candidates[i], "window", 0)))


def _without_unused(one: Baseline) -> Baseline:
  used = np.unique(one.assignment)
  settings = tuple(one.candidates[index] for index in used)
  return Baseline(settings, np.searchsorted(used, one.assignment))
