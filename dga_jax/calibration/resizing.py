"""The raw windows of a set, adjusted by measuring at equal cost.

The windows of the grid are few. Between them the best lengths of a set are found by moving keys
from one setting to another, with the heads of each setting unchanged.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from dga_jax.calibration.comparison import Baseline
from dga_jax.config import DGAConfig
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
  """The set with the raw windows that measure best, and its score.

  The window of a `SinkWindow` is counted in tokens, that of a `DGAConfig` in blocks. First each
  window alone takes the keys that the set leaves of the budget. Then a window grows by half, later
  by a fifth, and another pays for it. A change that lowers the score is kept.

  Args:
    one: the set.
    score: its measured score; lower is better.
    keys: the most keys that all heads may keep together.
    length: L, tokens of the context.
    measure: the score of a set.
  """
  one = _without_unused(one)
  windows = [index for index, setting in enumerate(one.candidates) if _unit(setting)]
  windows.sort(key=lambda index: -setting_keys(one.candidates[index], length))
  changes = [(index, index, 1.0) for index in windows]
  for factor in _FACTORS:
    changes += [(grown, paying, factor) for grown, paying in itertools.permutations(windows, 2)]
  for grown, paying, factor in changes:
    other = _move(one, grown, paying, factor, keys, length)
    if other is not None and (measured := measure(other)) < score:
      one, score = other, measured
  return one, score


def _move(
  one: Baseline, grown: int, paying: int, factor: float, keys: int, length: int
) -> Baseline | None:
  """The set with one window multiplied by a factor, and another that uses the keys that are left.

  None if this is the same set, if a window cannot be paid for or reaches the whole context, or if
  two settings become equal.
  """
  settings = list(one.candidates)
  if grown != paying:
    units = _window(settings[grown])
    settings[grown] = _resized(settings[grown], max(units + 1, round(factor * units)))
  counts = np.bincount(one.assignment.ravel(), minlength=len(settings))
  least = _resized(settings[paying], 0 if isinstance(settings[paying], DGAConfig) else 1)
  settings[paying] = least
  used = [setting_keys(setting, length) for setting in settings]
  free = (keys - int(np.dot(counts, used))) // int(counts[paying])
  if free < 0:
    return None
  settings[paying] = _resized(least, _window(least) + free // _unit(least))
  longest = max(setting_keys(settings[index], length) for index in (grown, paying))
  if longest >= length or len(set(settings)) < len(settings) or tuple(settings) == one.candidates:
    return None
  return one._replace(candidates=tuple(settings))


def _unit(setting: HeadSetting) -> int:
  """Keys of a unit of the window; 0 for a full head, which has none."""
  if isinstance(setting, DGAConfig):
    return setting.block_size
  return 1 if isinstance(setting, SinkWindow) else 0


def _window(setting: HeadSetting) -> int:
  if isinstance(setting, DGAConfig):
    return setting.local_window
  assert isinstance(setting, SinkWindow)
  return setting.window


def _resized(setting: HeadSetting, units: int) -> HeadSetting:
  if isinstance(setting, DGAConfig):
    return dataclasses.replace(setting, local_window=units)
  assert isinstance(setting, SinkWindow)
  return SinkWindow(units, setting.sinks)


def _without_unused(one: Baseline) -> Baseline:
  used = np.unique(one.assignment)
  settings = tuple(one.candidates[index] for index in used)
  return Baseline(settings, np.searchsorted(used, one.assignment))
