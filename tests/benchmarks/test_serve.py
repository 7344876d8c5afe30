"""The serving benchmark on a tiny model prints every table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks._resident_sessions import known_models, resident_sessions
from tests.dga_jax.evaluation.tiny import write_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
def test_every_table_is_printed(tmp_path: Path) -> None:
  command = [
    sys.executable, "-m", "benchmarks.serve", f"--workdir={write_checkpoint(tmp_path / 'run')}",
    "--kinds=dga,dense", "--clients=1,3", "--prompts=96", "--new_tokens=32", "--requests=1",
    "--slots=2", "--prompt_chunk=64", "--rounds=1", f"--output={tmp_path / 'results.jsonl'}",
  ]  # fmt: skip
  done = subprocess.run(
    command,
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  rows = done.stdout.splitlines()
  assert sum(line.startswith("| 96 |") for line in rows) == 4  # Loads.
  assert sum(line.startswith("| 96 + 32 |") for line in rows) == 2  # Second turns.
  assert sum(line.startswith(("| dga |", "| dense |")) for line in rows) == 2  # Overhead.
  results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
  tables = [result["table"] for result in results]
  assert tables == ["sessions"] * 8 + ["overhead"] * 2 + ["second_turn"] * 2 + ["load"] * 4
  assert all("cpu" in result["device"] for result in results)


def test_sessions_follow_the_shapes_of_caches() -> None:
  model, kinds = next(iter(known_models().items()))
  dense, dga, dga8, budgets = resident_sessions(model, kinds, 16384, 64 * 10**9)
  # 32 layers of 32 KV heads: keys and values of 128 numbers in 16 bit, and counts of tokens.
  assert dense.session_bytes - 2 * 32 * 32 * 128 * 2 * 16384 in range(1024)
  assert (dense.sessions, dense.slots) == (7, 5)
  # 910 blocks of 2 focal tokens and a group, and the 18 raw tokens of the unfinished block.
  assert dga.session_bytes - 2 * 32 * 32 * 128 * 2 * (910 * 3 + 18) in range(4096)
  assert (dga.sessions, dga.slots) == (44, 42)
  assert dga.sessions_of_dense == 44 / 7
  assert dga8.times_dense > 11
  assert budgets.times_dense > 9
