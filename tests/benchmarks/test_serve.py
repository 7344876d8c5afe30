"""The serving benchmark on a tiny model prints every table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dga_jax.evaluation.tiny import write_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
def test_every_table_is_printed(tmp_path: Path) -> None:
  command = [
    sys.executable, "-m", "benchmarks.serve", f"--workdir={write_checkpoint(tmp_path / 'run')}",
    "--kinds=dga,dense", "--clients=1,3", "--prompts=96", "--new_tokens=8", "--requests=1",
    "--slots=2", "--prompt_chunk=64", "--rounds=1",
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
  rows = [line for line in done.stdout.splitlines() if line.startswith("| 96 |")]
  assert len(rows) == 4 + 2 + 2  # Loads, second turns, sessions.
  assert sum(line.startswith(("| dga |", "| dense |")) for line in done.stdout.splitlines()) == 2
