"""Calibrated budgets beside baselines with the same bytes in the cache."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from dga_jax.config import DGAConfig
from dga_jax.head_budgets import FULL, HeadSetting, SinkWindow
from dga_jax.model.flops import setting_keys


class Baseline(NamedTuple):
  """A set to compare with.

  Attributes:
    candidates: what `assignment` counts.
    assignment: the candidate of each KV head.
  """

  candidates: tuple[HeadSetting, ...]
  assignment: Int[np.ndarray, "K N"]

  def share(self, length: int) -> float:
    """Keys in the cache over the keys of a dense cache."""
    keys = np.array([setting_keys(candidate, length) for candidate in self.candidates])
    return float(keys[self.assignment].mean() / length)

  def indices(self, settings: Sequence[HeadSetting]) -> Int[np.ndarray, "K N"]:
    """The assignment as indices into other settings, which contain those of this set."""
    return np.array([settings.index(one) for one in self.candidates])[self.assignment]


def one_setting(
  candidates: Sequence[HeadSetting], assignment: Int[np.ndarray, "K N"], length: int
) -> Baseline | None:
  """All heads under one `DGAConfig`, whose raw window uses the bytes of the set.

  Args:
    candidates: of the calibration; the blocks and sinks are those of the smallest `DGAConfig`.
    assignment: the set.
    length: L, tokens of the context.

  Returns:
    None if the set keeps every key, or if the config exceeds its bytes without a raw window.
  """
  keys = int(_keys(candidates, assignment, length).sum() // assignment.size)
  config = min(
    (one for one in candidates if isinstance(one, DGAConfig)),
    key=lambda one: setting_keys(one, length),
    default=None,
  )
  if config is None or keys >= length:
    return None
  without = setting_keys(dataclasses.replace(config, local_window=0), length)
  if without > keys:
    return None
  window = (keys - without) // config.block_size
  config = dataclasses.replace(config, local_window=window)
  return Baseline((config,), np.zeros(assignment.shape, int))


def sinks_and_window(
  candidates: Sequence[HeadSetting], assignment: Int[np.ndarray, "K N"], length: int
) -> Baseline | None:
  """The same full heads; sinks and a window in all others, at the bytes of the set.

  This is DuoAttention's form (Xiao et al., arXiv 2410.10819).

  Args:
    candidates: of the calibration; the sinks are the most that one of them has.
    assignment: the set.
    length: L, tokens of the context.

  Returns:
    None if the set has no head that is not full, or keeps too few keys for a window.
  """
  is_full_KxN = np.array([one == FULL for one in candidates])[assignment]
  keys = int(_keys(candidates, assignment, length).sum())
  return spread_window(is_full_KxN, keys, most_sinks(candidates), length)


def spread_window(
  is_full_KxN: Bool[np.ndarray, "K N"], keys: int, sinks: int, length: int
) -> Baseline | None:
  """Full heads, and sinks with one window in all others, that together keep at most `keys` keys.

  Returns:
    None if all heads are full, or if less than one token is left for the windows.
  """
  others = int((~is_full_KxN).sum())
  window = (keys - int(is_full_KxN.sum()) * length) // max(others, 1) - sinks
  if not others or window < 1:
    return None
  setting = SinkWindow(min(window, length - sinks), sinks)
  return Baseline((FULL, setting), np.where(is_full_KxN, 0, 1))


def scale_windows(one: Baseline, ratio: float) -> Baseline:
  """The set with every window multiplied by a ratio, for rows of another length.

  Raw blocks are rounded, and may become 0. Settings that become equal are one setting.
  """
  scaled = [_scaled(setting, ratio) for setting in one.candidates]
  settings = tuple(dict.fromkeys(scaled))
  return Baseline(settings, np.array([settings.index(x) for x in scaled])[one.assignment])


def _scaled(setting: HeadSetting, ratio: float) -> HeadSetting:
  if isinstance(setting, DGAConfig):
    return dataclasses.replace(setting, local_window=round(setting.local_window * ratio))
  if isinstance(setting, SinkWindow):
    return SinkWindow(max(1, int(setting.window * ratio)), setting.sinks)
  return setting


def most_sinks(candidates: Sequence[HeadSetting]) -> int:
  """The largest number of sinks of a candidate."""
  return max(map(_sinks, candidates))


def _sinks(setting: HeadSetting) -> int:
  if isinstance(setting, DGAConfig):
    return setting.sink_tokens
  return setting.sinks if isinstance(setting, SinkWindow) else 0


def _keys(
  candidates: Sequence[HeadSetting], assignment: np.ndarray, length: int
) -> Int[np.ndarray, "K N"]:
  """Keys in the cache of each head."""
  return np.array([setting_keys(candidate, length) for candidate in candidates])[assignment]
