"""The choice between budgets of the same weights, in Python and in dga generate."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dga_jax
from dga_jax import SinkWindow
from dga_jax.budget_choice import choose_budgets, find_budget_files, share_of_keys
from dga_jax.generation import Sampling
from dga_jax.head_budgets import FULL, HeadBudgets
from tests.dga_jax.evaluation.tiny import STORY, write_checkpoint

ROOT = Path(__file__).parents[2]

WINDOW = SinkWindow(window=12, sinks=4)
# Of 64 tokens a window head keeps 16: these shares are 1/4, 7/16 and 1.
QUARTER = HeadBudgets((FULL, WINDOW), ((1, 1), (1, 1)))
MIDDLE = HeadBudgets((FULL, WINDOW), ((1, 0), (1, 1)))
WHOLE = HeadBudgets((FULL,), ((0, 0), (0, 0)))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
  found = []
  for name, budgets in (("quarter", QUARTER), ("whole", WHOLE), ("middle", MIDDLE)):
    found.append(tmp_path / f"budgets_{name}.json")
    found[-1].write_text(budgets.to_json())
  return found


def test_shares_of_a_dense_cache():
  assert share_of_keys(QUARTER, 64) == 0.25
  assert share_of_keys(MIDDLE, 64) == (3 * 0.25 + 1) / 4
  assert share_of_keys(WHOLE, 64) == 1
  assert share_of_keys(QUARTER, 16) == 1


@pytest.mark.parametrize(
  ("keys", "chosen"), [(0.246, QUARTER), (0.4, QUARTER), (0.44, MIDDLE), (0.9, MIDDLE), (1, WHOLE)]
)
def test_the_largest_budgets_within_the_share_are_chosen(
  files: list[Path], keys: float, chosen: HeadBudgets
):
  path, budgets, share = choose_budgets(files, keys, 64)
  assert budgets == chosen
  assert share == share_of_keys(chosen, 64)
  assert HeadBudgets.to_json(budgets) == path.read_text()


def test_a_share_below_all_budgets_is_an_error(files: list[Path]):
  with pytest.raises(ValueError, match=r"keys is 0\.2, and all budgets .*quarter.json: 0\.250"):
    choose_budgets(files, 0.2, 64)


def test_files_of_budgets_are_beside_the_checkpoint(files: list[Path], tmp_path: Path):
  (tmp_path / "budgets_quarter.measured.jsonl").write_text("{}")
  assert find_budget_files(tmp_path, None) == sorted(files)
  assert find_budget_files(tmp_path, "a.json,b.json") == [Path("a.json"), Path("b.json")]
  with pytest.raises(FileNotFoundError, match="has no files budgets"):
    find_budget_files(tmp_path / "elsewhere", None)
  package = [Path("p.json")]
  assert find_budget_files(tmp_path / "elsewhere", None, package) == package
  assert find_budget_files(tmp_path, None, package) == sorted(files)


def test_generate_takes_a_share_of_the_keys(files: list[Path], tmp_path: Path):
  """The command prints the text of the model with the chosen budgets."""
  write_checkpoint(tmp_path)
  prompt = STORY[:40]
  command = [sys.executable, "-m", "dga_jax", "generate", f"--workdir={tmp_path}", "--keys=0.3"]
  command += [f"--prompt={prompt}", "--max_length=64", "--max_new_tokens=8", "--temperature=0"]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  path = tmp_path / "budgets_quarter.json"
  assert f"budgets: {path}, 25.0% of a dense cache of 64 tokens" in done.stderr
  model, tokenizer = dga_jax.load(tmp_path, budgets=QUARTER)
  greedy = Sampling(temperature=0.0)
  text = dga_jax.generate(model, tokenizer, prompt, max_new_tokens=8, sampling=greedy)
  assert done.stdout == f"{prompt}{text}\n"
