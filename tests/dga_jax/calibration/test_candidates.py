"""Candidates, what they cost, and the baselines of equal bytes."""

import dataclasses

import jax
import numpy as np
import pytest

from dga_jax.calibration.candidates import (
  head_costs,
  label,
  make_grid,
)
from dga_jax.calibration.comparison import one_setting, sinks_and_window, spread_window
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import FULL, SinkWindow
from dga_jax.model.attention_kinds.head_budgets import kind_of_setting
from dga_jax.model.flops import mean_keys, setting_keys
from tests.dga_jax.calibration import small


def test_the_grid_is_every_block_with_every_window() -> None:
  grid = make_grid([(14, 2), (30, 2)], [32, 128], 4, 1024)
  assert grid[0] == FULL
  configs = [one for one in grid if isinstance(one, DGAConfig)]
  shapes = [(one.block_size, one.local_window, one.sink_tokens) for one in configs]
  assert shapes == [(16, 8, 4), (32, 4, 4), (16, 2, 4), (32, 1, 4)]
  sizes = [setting_keys(one, 1024) for one in grid]
  assert sizes == sorted(sizes, reverse=True)
  assert label(configs[0]) == "14+2, 4 sinks, 8 raw blocks"
  fitted = make_grid([(14, 2), (30, 2)], [32, 128], 4, 1024, has_selector=True)
  assert dataclasses.replace(configs[0], selector="fitted") in fitted
  assert label(fitted[2]) == "14+2, 4 sinks, 8 raw blocks, fitted selector"
  # Each size has a sliding window, which precedes the config.
  windows = [SinkWindow(setting_keys(one, 1024) - 4, 4) for one in configs]
  assert [one for one in grid if isinstance(one, SinkWindow)] == windows
  assert grid.index(windows[0]) + 1 == grid.index(configs[0])
  assert label(windows[0]) == f"4 sinks, window of {windows[0].window}"
  further = make_grid([(14, 2)], [32], 4, 1024, sliding_windows=[700, 50])
  alone = [one.window for one in further if isinstance(one, SinkWindow)]
  assert alone == [700, setting_keys(configs[2], 1024) - 4, 50]
  # Windows that round to the same number of blocks are one candidate.
  assert len(make_grid([(30, 2)], [32, 33], 4, 1024)) == 3


def test_a_candidate_that_saves_nothing_is_refused() -> None:
  with pytest.raises(ValueError, match=r"'30\+2, 4 sinks, 4 raw blocks' keeps 179 cache entries"):
    make_grid([(30, 2)], [128], 4, 176)
  with pytest.raises(ValueError, match=r"'4 sinks, window of 172' keeps 176 cache entries of 176"):
    make_grid([(30, 2)], [0], 4, 176, sliding_windows=[172])


@pytest.mark.parametrize(
  "candidate", [*small.CANDIDATES, SinkWindow(30, 2), SinkWindow(500)], ids=label
)
def test_bytes_are_those_of_the_arrays_of_the_cache(candidate: object) -> None:
  config = dataclasses.replace(small.CONFIG, dtype="bfloat16")
  cache = jax.eval_shape(
    lambda: kind_of_setting(candidate).init_cache(1, 301, 1, config.head_dim, "bfloat16")
  )
  arrays = [x for x in jax.tree.leaves(cache) if jax.numpy.issubdtype(x.dtype, np.floating)]
  size = sum(x.size * x.dtype.itemsize for x in arrays)
  scores = 4 * candidate.block_size if candidate == small.SHORT else 0
  assert size == setting_keys(candidate, 301) * 2 * config.head_dim * 2 + scores
  assert head_costs("bytes", [candidate], config, 301).tolist() == [size]


def test_operations_are_those_of_the_keys_that_queries_see() -> None:
  candidates = (*small.CANDIDATES[:2], SinkWindow(9, sinks=2))
  full, streaming, window = head_costs("flops", candidates, small.CONFIG, 64)
  # 64 queries of 2 heads of width 8 pay q·K and w·V for (64 + 1)/2 keys.
  assert full == 64 * 2 * 4 * 8 * 65 / 2
  dga = dataclasses.replace(small.CONFIG, attention="dga", dga=small.STREAMING)
  assert streaming == 64 * 2 * 4 * 8 * mean_keys(dga, 64)
  assert streaming < full
  assert window == 64 * 2 * 4 * 8 * np.mean([min(i + 1, 11) for i in range(64)])


def test_latency_is_measured() -> None:
  candidates = (*small.CANDIDATES, SinkWindow(9, sinks=2))  # One has the fitted selector.
  seconds = head_costs("latency", candidates, small.CONFIG, 64)
  assert seconds.shape == (4,)
  assert (seconds > 0).all()
  assert (seconds < 10).all()


def test_baselines_use_at_most_the_bytes_of_the_set() -> None:
  length = 1024
  grid = make_grid([(30, 2)], [32, 192], 4, length)
  assignment = np.array([[0, 1, 4], [3, 4, 2]])
  keys = np.array([setting_keys(one, length) for one in grid])[assignment]
  uniform = one_setting(grid, assignment, length)
  assert uniform is not None
  (config,) = uniform.candidates
  assert isinstance(config, DGAConfig)
  assert keys.mean() / length - config.block_size / length < uniform.share(length)
  assert uniform.share(length) <= keys.mean() / length
  duo = sinks_and_window(grid, assignment, length)
  assert duo is not None
  assert duo.candidates[0] == FULL
  assert (duo.assignment == [[0, 1, 1], [1, 1, 1]]).all()
  assert keys.mean() / length - 1 / length < duo.share(length) <= keys.mean() / length
  window = duo.candidates[1]
  assert isinstance(window, SinkWindow)
  assert (window.sinks, window.window) == (4, int(keys.ravel()[1:].mean()) - 4)


def test_a_set_of_full_heads_has_no_baselines() -> None:
  full = np.zeros((2, 3), int)
  assert one_setting(small.CANDIDATES, full, 1024) is None
  assert sinks_and_window(small.CANDIDATES, full, 1024) is None


def test_a_window_of_no_token_is_no_baseline() -> None:
  is_full = np.array([[True, False, False]])
  assert spread_window(is_full, 1024 + 2 * 5, 4, 1024) is not None
  assert spread_window(is_full, 1024 + 2 * 5 - 1, 4, 1024) is None
