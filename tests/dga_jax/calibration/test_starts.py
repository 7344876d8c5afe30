"""The allocations from which a calibration starts."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dga_jax.calibration.allocation import Bounds, count_rows
from dga_jax.calibration.candidates import make_grid
from dga_jax.calibration.comparison import Baseline
from dga_jax.calibration.starts import bound_rows, make_starts, read_starts, Start
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import FULL, HeadBudgets, SinkWindow
from dga_jax.model.flops import setting_keys
from tests.dga_jax.calibration import small


def test_starts_are_within_the_budget() -> None:
  length, shape = 512, (4, 3)
  grid = make_grid([(30, 2)], [0, 96], 4, length)
  cost = np.array([4.0 * setting_keys(one, length) for one in grid])
  damage = np.random.default_rng(0).random((12, 1)) * (1 - cost / cost[0])[None]
  budget = 0.4 * 12 * cost[0]
  bounds = Bounds(kv_heads=3, rows=3)
  starts = make_starts(grid, damage, cost, budget, shape, bounds, length=length, equal_bytes=True)
  names = [start.name for start in starts]
  assert names[:2] == ["solver, all candidates", "solver, windows alone"]
  assert names[-1] == "one DGA setting"
  assert len(starts) == 6  # One for each of two windows, and one with the solver's full heads.
  for _, one in starts:
    assert one.share(length) <= 0.4
    assert one.share(length) > 0.37 or len(one.candidates) == 1
    assert count_rows(one.assignment.ravel(), 3) <= 3
  windows = starts[1].set
  assert not any(isinstance(grid[index], DGAConfig) for index in np.unique(windows.assignment))
  for _, one in starts[2:-1]:
    assert isinstance(one.candidates[1], SinkWindow)
    assert one.candidates[1].sinks == 4
  others = make_starts(grid, damage, cost, budget, shape, bounds, length=length, equal_bytes=False)
  assert [one.candidates == grid for _, one in others] == [True] * len(others)


def test_the_solver_starts_without_the_blocks_of_each_size_that_it_uses() -> None:
  length, shape = 512, (2, 3)
  grid = make_grid([(30, 2), (62, 2), (14, 2)], [0], 4, length)
  cost = np.array([4.0 * setting_keys(one, length) for one in grid])
  damage = np.tile((1 - cost / cost[0]) ** 2, (6, 1))
  for index, one in enumerate(grid):
    if isinstance(one, SinkWindow) or one == FULL or one.group_size == 62:
      damage[:, index] *= 2
  starts = make_starts(
    grid, damage, cost, 0.2 * 6 * cost[0], shape, Bounds(3, 8), length=length, equal_bytes=True
  )
  solved = {start.name: start.set for start in starts if start.name.startswith("solver")}
  sizes = {
    name: {
      x.group_size
      for index in np.unique(one.assignment)
      if isinstance(x := one.candidates[index], DGAConfig)
    }
    for name, one in solved.items()
  }
  used = sizes["solver, all candidates"]
  assert used
  assert list(solved) == [
    "solver, all candidates",
    *(f"solver, without {m}+2" for m in sorted(used)),
    "solver, windows alone",
  ]
  for m in used:
    assert m not in sizes[f"solver, without {m}+2"]
  assert not sizes["solver, windows alone"]


def test_a_start_with_many_rows_changes_few_heads() -> None:
  candidates = (FULL, SinkWindow(8), SinkWindow(2))
  assignment = np.array([[0, 1], [0, 1], [1, 1], [1, 1], [1, 2]])
  damage = np.tile([0.0, 1, 2], (10, 1))
  damage[8] = [0.0, 1, 5]
  cost = np.array([64.0, 12, 6])
  start = Start("file", Baseline(candidates, assignment))
  assert bound_rows(start, damage, cost, Bounds(2, 3)) is start
  few = bound_rows(start, damage, cost, Bounds(2, 2))
  # No head may cost more; the fourth layer's head with the least damage takes the small window.
  assert count_rows(few.set.assignment.ravel(), 2) == 2
  assert cost[few.set.assignment].sum() <= cost[assignment].sum()
  assert (few.set.assignment != assignment).sum() == 2
  assert (few.name, few.set.candidates) == (start.name, candidates)


def test_windows_of_a_file_are_scaled_to_the_length(tmp_path: Path) -> None:
  config = dataclasses.replace(small.CONFIG, num_layers=2, num_kv_heads=1, focal_selector=False)
  path = tmp_path / "one.json"
  budgets = HeadBudgets((FULL, SinkWindow(64)), ((0,), (1,)))
  path.write_text(budgets.to_json())
  (start,) = read_starts([path], config, 256)
  assert (start.name, start.set.candidates) == ("one.json", budgets.settings)
  path.write_text(json.dumps(budgets.to_dict() | {"calibration": {"length": 512}}))
  (start,) = read_starts([path], config, 256)
  assert start.set.candidates == (FULL, SinkWindow(32))
  assert start.set.assignment.tolist() == [[0], [1]]
  with pytest.raises(ValueError, match=r"budgets of 2 layers of 1 KV heads, and the model has 3"):
    read_starts([path], dataclasses.replace(config, num_layers=3), 256)
  fitted = DGAConfig(selection="streaming", selector="fitted", group_size=6, focal_per_block=1)
  path.write_text(HeadBudgets((FULL, fitted), ((0,), (1,))).to_json())
  with pytest.raises(ValueError, match="the model has no fitted selector"):
    read_starts([path], config, 256)
