"""Windows of a set are resized at equal keys, and only by changes that measure better."""

import numpy as np
import pytest

from dga_jax.calibration.comparison import Baseline
from dga_jax.calibration.resizing import resize_windows
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import FULL, SinkWindow

LENGTH = 1024
BLOCKS = DGAConfig(selection="streaming", group_size=30, focal_per_block=2, sink_tokens=4)
ASSIGNMENT = np.array([[0, 1, 3], [3, 3, 4]])
SETTINGS = (FULL, SinkWindow(200), SinkWindow(300), SinkWindow(50), BLOCKS)


def windows(one: Baseline) -> list[int]:
  return [s.window for s in one.candidates if isinstance(s, SinkWindow)]


def run(best: tuple[int, int], spare: int = 0) -> tuple[Baseline, float, list[Baseline]]:
  """The result, where the score is the distance in logarithms of two windows from `best`."""
  measured: list[Baseline] = []

  def score(one: Baseline) -> float:
    return float(np.abs(np.log(windows(one)) - np.log(best)).sum())

  def measure(one: Baseline) -> float:
    measured.append(one)
    return score(one)

  start = Baseline(SETTINGS, ASSIGNMENT)
  keys = round(start.share(LENGTH) * LENGTH * ASSIGNMENT.size) + spare
  used = Baseline((FULL, SETTINGS[1], SETTINGS[3], BLOCKS), np.array([[0, 1, 2], [2, 2, 3]]))
  one, final = resize_windows(start, score(used), keys=keys, length=LENGTH, measure=measure)
  assert final == score(one)
  for tried in measured:
    total = tried.share(LENGTH) * LENGTH * ASSIGNMENT.size
    assert keys - 3 < round(total) <= keys
  return one, final, measured


def test_keys_move_to_the_window_that_needs_them() -> None:
  # One head has the long window and three the short one.
  one, _, measured = run(best=(300, 17))
  assert one.candidates[0] == FULL
  assert one.candidates[3] == BLOCKS
  assert one.assignment.tolist() == [[0, 1, 2], [2, 2, 3]]
  long, short = windows(one)
  assert (long, short) == (300, 16)
  assert len(measured) <= 2 + 4
  long, short = windows(run(best=(60, 96))[0])
  assert 45 < long < 120
  assert 75 < short < 100


def test_what_the_set_leaves_is_used() -> None:
  one, _, _ = run(best=(260, 50), spare=60)
  assert windows(one) == [260, 50]


def test_no_change_that_measures_worse_is_kept() -> None:
  one, score, measured = run(best=(200, 50))
  assert windows(one) == [200, 50]
  assert score == 0
  assert measured


@pytest.mark.parametrize("candidates", [(FULL, BLOCKS), (FULL, SinkWindow(30))])
def test_a_set_without_two_windows_has_nothing_to_move(candidates: tuple) -> None:
  start = Baseline(candidates, np.array([[0, 1], [1, 1]]))
  keys = round(start.share(LENGTH) * LENGTH * 4)

  def measure(one: Baseline) -> float:
    raise AssertionError("nothing changes")

  one, score = resize_windows(start, 1.0, keys=keys, length=LENGTH, measure=measure)
  assert (one.candidates, score) == (candidates, 1.0)
