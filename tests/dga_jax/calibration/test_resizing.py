"""Windows of a set are resized at equal keys, and only by changes that measure better."""

import numpy as np
import pytest

from dga_jax.calibration.comparison import Baseline
from dga_jax.calibration.resizing import resize_windows
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import FULL, SinkWindow

LENGTH = 1024
BLOCKS = DGAConfig(
  selection="streaming", group_size=30, focal_per_block=2, sink_tokens=4, local_window=4
)
ASSIGNMENT = np.array([[0, 1, 3], [3, 3, 1]])
SETTINGS = (FULL, SinkWindow(200), SinkWindow(300), SinkWindow(50))


def windows(one: Baseline) -> list[int]:
  return [s.window for s in one.candidates if isinstance(s, SinkWindow)]


def keys_of(one: Baseline) -> int:
  return round(one.share(LENGTH) * LENGTH * one.assignment.size)


def run(best: tuple[int, int], spare: int = 0) -> tuple[Baseline, float, list[Baseline]]:
  """The result, where the score is the distance in logarithms of two windows from `best`."""
  measured: list[Baseline] = []

  def score(one: Baseline) -> float:
    return float(np.abs(np.log(windows(one)) - np.log(best)).sum())

  def measure(one: Baseline) -> float:
    measured.append(one)
    return score(one)

  start = Baseline(SETTINGS, ASSIGNMENT)
  used = Baseline((FULL, SETTINGS[1], SETTINGS[3]), np.array([[0, 1, 2], [2, 2, 1]]))
  keys = keys_of(start) + spare
  one, final = resize_windows(start, score(used), keys=keys, length=LENGTH, measure=measure)
  assert final == score(one)
  assert all(keys - 3 < keys_of(tried) <= keys for tried in measured)
  return one, final, measured


def test_keys_move_to_the_window_that_needs_them() -> None:
  # Two heads have the long window and three the short one.
  one, _, measured = run(best=(225, 33))
  assert one.candidates[0] == FULL
  assert one.assignment.tolist() == [[0, 1, 2], [2, 2, 1]]
  assert windows(one) == [233, 28]
  assert len(measured) <= 2 + 4
  long, short = windows(run(best=(60, 143))[0])
  assert (long, short) != (200, 50)
  assert long < 200
  assert short > 50


def test_what_the_set_leaves_is_used() -> None:
  one, _, _ = run(best=(230, 50), spare=60)
  assert windows(one) == [230, 50]


def test_no_change_that_measures_worse_is_kept() -> None:
  one, score, measured = run(best=(200, 50))
  assert windows(one) == [200, 50]
  assert score == 0
  assert measured


def test_raw_blocks_are_a_window_too() -> None:
  start = Baseline((FULL, BLOCKS, SinkWindow(100)), np.array([[0, 1], [1, 2]]))
  tried = []

  def measure(one: Baseline) -> float:
    tried.append(one)
    assert keys_of(one) <= keys_of(start)
    (blocks,) = (s for s in one.candidates if isinstance(s, DGAConfig))
    return float(-blocks.local_window)

  one, score = resize_windows(start, -4, keys=keys_of(start), length=LENGTH, measure=measure)
  # Two heads with one block more each take 64 of the 100 tokens of the window.
  assert score == -5
  assert one.candidates[1].local_window == 5  # type: ignore[union-attr]
  assert windows(one) == [36]


@pytest.mark.parametrize("candidates", [(FULL, BLOCKS), (FULL, SinkWindow(30))])
def test_a_set_without_two_windows_has_nothing_to_move(candidates: tuple) -> None:
  start = Baseline(candidates, np.array([[0, 1], [1, 1]]))

  def measure(one: Baseline) -> float:
    raise AssertionError("nothing changes")

  one, score = resize_windows(start, 1.0, keys=keys_of(start), length=LENGTH, measure=measure)
  assert (one.candidates, score) == (candidates, 1.0)
