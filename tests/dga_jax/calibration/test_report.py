"""The written result, and the command from its flags to its files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dga_jax.budget_choice import find_budget_files
from dga_jax.calibration.allocation import Scale
from dga_jax.calibration.candidates import make_grid
from dga_jax.calibration.comparison import Baseline
from dga_jax.calibration.goal import Goal
from dga_jax.calibration.measuring import Divergence, HeadRises, SetLoss
from dga_jax.calibration.plot import plot_budgets
from dga_jax.calibration.report import table, write_json
from dga_jax.calibration.run import Calibration, make_budgets, TableRow
from dga_jax.calibration.search import Improved
from dga_jax.calibration.starts import Start
from dga_jax.head_budgets import FULL, HeadBudgets, read_head_budgets
from dga_jax.model.flops import setting_keys
from tests.dga_jax.evaluation import tiny

ROOT = Path(__file__).parents[3]
GRID = make_grid([(30, 2)], [32, 192], 4, 1024)
ASSIGNMENT = np.array([[3, 0, 3], [3, 4, 0]])


def calibration() -> Calibration:
  rng = np.random.default_rng(0)
  rise = rng.exponential(size=(2, 3, 5)) * [0, 1, 1, 2, 2]
  rises = HeadRises(rise, 10 * rise)
  dense = SetLoss(3.0, 0.5, 4, 4, Divergence(0.0, 0.0))
  row = TableRow(
    share=0.5,
    cost=0.44,
    full_heads=2,
    predicted=Divergence(float(np.log(1.25)), 0.25),
    budgets=SetLoss(3.0 + float(np.log(1.5)), 1.0, 3, 4, Divergence(0.3, 0.4)),
    one_setting=None,
    sinks_and_window=SetLoss(3.0 + float(np.log(2)), 1.5, 1, 4, Divergence(0.6, 1.0)),
  )
  return Calibration(
    make_budgets(GRID, ASSIGNMENT),
    GRID,
    rises,
    Scale.from_rises(rises),
    np.array([3.0, 2, 2, 1, 1]),
    0.44,
    (
      (Start("solver", Baseline(GRID, ASSIGNMENT)), 0.2),
      (Start("one DGA setting", Baseline(GRID, 0 * ASSIGNMENT + 4)), 0.7),
    ),
    0,
    Improved(Baseline(GRID, ASSIGNMENT), 0.1, 5, 2),
    dense,
    row,
    [row],
  )


def test_budgets_keep_the_settings_in_use_alone() -> None:
  budgets = make_budgets(GRID, ASSIGNMENT)
  assert budgets.settings == (FULL, GRID[3], GRID[4])
  for (layer, head), index in np.ndenumerate(ASSIGNMENT):
    assert budgets.setting(layer, head) == GRID[index]


def test_the_file_is_read_back(tmp_path: Path) -> None:
  path = tmp_path / "new" / "budgets.json"
  result = calibration()
  write_json(result, {"length": 1024, "share": 0.5}, path)
  assert read_head_budgets(path) == result.budgets
  assert [one.name for one in path.parent.iterdir()] == ["budgets.json"]
  stored = json.loads(path.read_text())["calibration"]
  assert (stored["length"], stored["share"], stored["cost"]) == (1024, 0.5, 0.44)
  assert stored["changes"] == {"tried": 5, "accepted": 2}
  assert (stored["chosen_start"], stored["score"]) == ("solver", 0.1)
  start = stored["starts"][1]
  assert (start["name"], start["score"]) == ("one DGA setting", 0.7)
  assert HeadBudgets.from_dict(start["budgets"]).counts() == {GRID[4]: 6}
  assert stored["candidates"][0] == {"label": "full", "setting": "full", "cost_of_a_head": 3.0}
  assert stored["table"][0]["budgets"]["found"] == 3
  assert stored["chosen"]["sinks_and_window"]["divergence"] == {"text": 0.6, "retrieval": 1.0}
  np.testing.assert_array_equal(stored["rise_of_text_divergence"], result.rises.text)
  path.write_text(result.budgets.to_json())
  assert read_head_budgets(path) == result.budgets


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", r"budgets\.json is not JSON"),
    ("[]", r"budgets\.json is \[\]; it must be a mapping"),
    ('{"settings": ["full"], "calibration": {}}', "keys 'settings' and 'assignment'"),
    ('{"settings": ["full"], "assignment": [[1]]}', r"HeadBudgets\.assignment is"),
    ('{"settings": ["full"], "assignment": [[0]], "calibration": []}', r"calibration=\[\]; it"),
  ],
)
def test_other_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
  path = tmp_path / "budgets.json"
  path.write_text(content)
  with pytest.raises(ValueError, match=message):
    read_head_budgets(path)


def test_the_table_shows_ratios_of_perplexity() -> None:
  lines = table(calibration()).splitlines()
  assert lines[0] == "Dense: perplexity 20.086, retrieval 0.500 (4 of 4)."
  assert lines[4] == "| 0.50 | 0.440 | 2 | text | 1.2500 | 1.5000 | - | 2.0000 |"
  assert lines[5] == "| | | | retrieval | 0.750 | 1.000 (3 of 4) | - | 1.500 (1 of 4) |"
  assert lines[6].startswith("| **0.50, corrected** | 0.440 | 2 | text |")
  assert lines[-3:] == [
    "- solver: 0.2000",
    "- one DGA setting: 0.7000",
    "- solver, after 2 of 5 measured changes of the best starts: 0.1000",
  ]


@pytest.mark.parametrize("copies", [1, 4])
def test_the_picture_is_a_png(copies: int, tmp_path: Path) -> None:
  path = tmp_path / "budgets.png"
  result, assignment = calibration(), np.tile(ASSIGNMENT, (1, copies))  # 3 or 12 KV heads.
  rises = HeadRises(*(np.tile(rise, (1, copies, 1)) for rise in result.rises))
  result = result._replace(rises=rises, budgets=make_budgets(GRID, assignment))
  plot_budgets(result, 1024, "model: 1024 tokens, 0.44 of dense bytes", path)
  content = path.read_bytes()
  assert content.startswith(b"\x89PNG")
  assert len(content) > 10_000


@pytest.mark.parametrize("share", [0.0, 1.1, float("nan")])
def test_a_share_is_above_0_and_at_most_1(share: float) -> None:
  with pytest.raises(ValueError, match=r"a share of the dense cost is"):
    Goal(share, "bytes", 64, 0.05, 8, 2, 4, 1, ())


def calibrate(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
  command = [
    sys.executable, "-m", "dga_jax.calibrate", f"--workdir={tmp_path / 'run'}",
    f"--documents={tmp_path / 'documents.jsonl'}", "--blocks=6+1", "--windows=7,42", "--sinks=2",
    "--samples=1", "--puzzles=passkey", "--sliding_windows=",
    "--rounds=2", "--batch_size=4", "--tail=0", *flags,
  ]  # fmt: skip
  return subprocess.run(
    command,
    cwd=ROOT,
    env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_command(tmp_path: Path) -> None:
  tiny.write_checkpoint(tmp_path / "run")
  tiny.write_documents(tmp_path)
  done = calibrate(tmp_path, "--length=256", "--keys=0.6", "--shares=1")
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("Dense: perplexity ")
  output = tmp_path / "run" / "budgets-0.6.json"  # Where dga generate --keys looks.
  assert done.stdout.split()[-2:] == [str(output), str(output.with_suffix(".png"))]
  assert find_budget_files(tmp_path / "run", None) == [output]
  budgets = read_head_budgets(output)
  assert (budgets.num_layers, budgets.num_kv_heads) == (2, 2)
  keys = [setting_keys(budgets.setting(layer, head), 256) for layer in (0, 1) for head in (0, 1)]
  stored = json.loads(output.read_text())["calibration"]
  assert stored["cost"] == pytest.approx(np.mean(keys) / 256)
  assert stored["cost"] <= 0.6
  assert stored["table"][0]["budgets"] == stored["dense"]
  measured = (tmp_path / "run/budgets.measured.jsonl").read_text()
  # 4 heads under 4 candidates, on text and on retrieval.
  heads = [line for line in measured.splitlines() if '"head ' in line]
  assert sum(" beside " not in line for line in heads) == 4 * 4 * 2
  assert sum(" beside " in line for line in heads) % (4 * 2) == 0
  # The result is no worse than any start on the calibration rows, which are the table's.
  assert min(one["score"] for one in stored["starts"]) >= stored["score"] - 1e-12
  # The same command measures nothing again.
  content = output.read_bytes()
  again = calibrate(tmp_path, "--length=256", "--keys=0.6", "--shares=1")
  assert (again.returncode, again.stdout) == (0, done.stdout)
  assert (tmp_path / "run/budgets.measured.jsonl").read_text() == measured
  assert output.read_bytes() == content
  # Budgets of other flags do not replace them, unless the command names the file.
  other = calibrate(tmp_path, "--length=256", "--keys=0.6", "--shares=1", "--layer_kinds=1")
  assert other.returncode != 0
  assert (
    f"{output} exists and was made with other values of flags. Give --output=FILE" in other.stderr
  )
  assert output.read_bytes() == content
