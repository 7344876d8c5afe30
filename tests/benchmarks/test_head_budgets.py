"""benchmarks/head_budgets.py on a tiny model: the sets, their shares, the table, and resuming."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks._budget_baselines import interval, make_baselines, Set
from benchmarks._budget_costs import costs_table
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import FULL, HeadBudgets, SinkWindow
from tests.dga_jax.evaluation import tiny

ROOT = Path(__file__).parents[2]
WINDOW = SinkWindow(60, 4)
BUDGETS = HeadBudgets((FULL, WINDOW, SinkWindow(20, 4)), ((0, 1), (2, 2)))
DUO = HeadBudgets((FULL, SinkWindow(30, 4)), ((1, 0), (1, 1)))
STORED = {
  "length": 512,
  "starts": [
    {"name": "solver", "score": 0.1, "budgets": BUDGETS.to_dict()},
    {"name": "1 full heads, sinks and window", "score": 0.3, "budgets": DUO.to_dict()},
    {"name": "2 full heads, sinks and window", "score": 0.5, "budgets": BUDGETS.to_dict()},
  ],
}


def test_baselines_have_at_most_the_keys_of_the_budgets() -> None:
  config = tiny.CONFIG
  sets = dict(make_baselines(BUDGETS, STORED, config))
  assert list(sets) == ["same full heads", "sinks and window", "one window", "one DGA setting"]
  assert sets["sinks and window"] == DUO
  most = (512 + 64 + 24 + 24) / (4 * 512)
  for one in sets.values():
    assert one is not None
    assert Set("b", "", one, 512).share(512) <= most
  same = sets["same full heads"]
  assert same is not None
  assert same.assignment == ((0, 1), (1, 1))
  assert same.settings == (FULL, SinkWindow((64 + 24 + 24) // 3 - 4, 4))
  (uniform,) = sets["one DGA setting"].settings  # type: ignore[union-attr]
  assert isinstance(uniform, DGAConfig)
  assert (uniform.group_size, uniform.selector) == (30, "last_query")
  assert sets["one window"].settings == (SinkWindow(512 * 1 // 4 + 24, 4),)  # type: ignore[union-attr]


def test_windows_scale_with_the_length() -> None:
  blocks = DGAConfig(
    selection="streaming", group_size=6, focal_per_block=2, sink_tokens=4, local_window=4
  )
  budgets = HeadBudgets((FULL, WINDOW, blocks), ((0, 1), (2, 2)))
  longer = Set("b", "budgets", budgets, 512).scaled_to(1024).budgets
  assert longer.settings[:2] == (FULL, SinkWindow(120, 4))
  assert longer.settings[2].local_window == 8  # type: ignore[union-attr]
  assert longer.assignment == budgets.assignment
  two = HeadBudgets((FULL, SinkWindow(60, 4), SinkWindow(61, 4)), ((0, 1), (2, 2)))
  shorter = Set("b", "budgets", two, 512).scaled_to(16).budgets
  assert shorter == HeadBudgets((FULL, SinkWindow(1, 4)), ((0, 1), (1, 1)))


def test_costs_are_those_of_all_heads() -> None:
  dense = HeadBudgets((FULL,), ((0, 0), (0, 0)))
  sets = [Set("", "dense", dense, 512), Set("b", "budgets", BUDGETS, 512)]
  rows = [line.strip("| ").split(" | ") for line in costs_table(sets, tiny.CONFIG, 512).split("\n")]
  first, second = rows[-2:]
  megabytes = 2 * tiny.CONFIG.head_dim * 4 * 512 * 4 / 1e6
  assert first[-7:-4] == ["dense", f"{megabytes:.1f} MB", "1.0000"]
  assert second[:2] == ["b", "budgets"]
  assert second[3] == f"{sets[1].share(512):.4f}"
  # A query of a full head sees 256.5 keys on average, one of a window of w at most w.
  keys = [np.minimum(np.arange(512) + 1, most).mean() for most in (512, 64, 24, 24)]
  assert second[5] == f"{sum(keys) / (4 * 256.5):.4f}"
  assert all(float(row[6].removesuffix(" ms")) > 0 for row in rows[-1:])


def test_the_interval_covers_the_mean_of_the_cells() -> None:
  rng = np.random.default_rng(0)
  cells = [rng.normal(1, 0.1, 50), rng.normal(3, 0.1, 20)]
  low, high = interval(cells, seed=0)
  mean = np.mean([cell.mean() for cell in cells])
  error = np.sqrt(sum(cell.var() / len(cell) for cell in cells)) / 2
  assert low < mean < high
  assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_the_command(tmp_path: Path) -> None:
  tiny.write_checkpoint(tmp_path / "run")
  documents = tiny.write_documents(tmp_path)
  content = BUDGETS.to_dict() | {"calibration": STORED}
  (tmp_path / "budgets.json").write_text(json.dumps(content))
  command = [
    sys.executable, "-m", "benchmarks.head_budgets", f"--workdir={tmp_path / 'run'}",
    f"--documents={documents}", f"--budgets={tmp_path / 'budgets.json'}", f"--out={tmp_path / 'o'}",
    "--lengths=256", "--prompts=256", "--tasks=passkey", "--samples=2", "--dtype=float32",
    "--last=16", "--ruler=400", "--ruler_tasks=single", "--ruler_samples=1",
  ]  # fmt: skip
  env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  tables = []
  for _ in range(2):
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tables.append((tmp_path / "o" / "table.md").read_text())
  assert tables[0] == tables[1]
  lines = [line for line in tables[0].splitlines() if line.startswith(("|  |", "| budgets |"))]
  assert len(lines) == 24  # Dense, the budgets and four baselines, in four tables.
  lines = (tmp_path / "o/results.jsonl").read_text().splitlines()
  model, *results = map(json.loads, lines)
  assert model["settings"]["dtype"] == "float32"
  assert len(results) == 24
  assert [len(one["loss"]) for one in results[6:12]] == [2] * 6
  assert all(list(map(len, one["scores"])) == [1] for one in results[18:])
  dense = results[0]
  assert dense["divergence"] == [0, 0]
  assert len(dense["loss"]) == 2
  assert all(min(one["divergence"]) > 0 for one in results[1:6])
