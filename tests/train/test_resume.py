"""A run that is killed and restarted equals an uninterrupted run bit for bit."""

import random
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL, SIGTERM

import pytest

from dga_jax.checkpoint_files import list_steps
from tests.train.compare import assert_same_run, records
from train.stop_signals import EXIT_STATUS

STEPS = 40
OVERRIDES = (f"--config.num_steps={STEPS}", "--config.checkpoint_every=2", "--config.eval_every=10")

type StartTrainer = Callable[..., subprocess.Popen[str]]
type RunTrainer = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def uninterrupted(run_trainer: RunTrainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
  workdir = tmp_path_factory.mktemp("uninterrupted")
  status, output = run_trainer(workdir, *OVERRIDES)
  assert status == 0, output
  return workdir


def stop_after(
  process: subprocess.Popen[str], workdir: Path, number: int, seconds: float
) -> tuple[int, str]:
  """Sends the trainer a signal after its first metrics; returns its exit status and output."""
  metrics = workdir / "metrics.jsonl"
  size = metrics.stat().st_size if metrics.exists() else 0
  while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > size):
    time.sleep(0.02)
  time.sleep(seconds)
  process.send_signal(number)
  output, _ = process.communicate()
  return process.returncode, output


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(2))
def test_signals_at_random_moments(
  seed: int,
  start_trainer: StartTrainer,
  run_trainer: RunTrainer,
  uninterrupted: Path,
  tmp_path: Path,
) -> None:
  rng = random.Random(seed)
  signals = [SIGKILL, SIGKILL, SIGTERM]
  rng.shuffle(signals)
  statuses = []
  for number in signals:
    trainer = start_trainer(tmp_path, *OVERRIDES)
    status, output = stop_after(trainer, tmp_path, number, rng.uniform(0, 1.5))
    statuses.append(status)
    if match := re.search(r"Asked to stop: step (\d+) is saved", output):
      assert list_steps(tmp_path)[-1] == int(match[1])
  late = {-SIGTERM} if STEPS in list_steps(tmp_path) else set()
  assert set(statuses) <= {-SIGKILL, 0, EXIT_STATUS} | late
  assert -SIGKILL in statuses
  status, output = run_trainer(tmp_path, *OVERRIDES)
  assert status == 0, output
  assert_same_run(tmp_path, uninterrupted, STEPS)


def test_metrics_contain_each_step_once(uninterrupted: Path) -> None:
  steps = [record["step"] for record in records(uninterrupted) if "loss" in record]
  assert steps == list(range(1, STEPS + 1))
  held_out = [record["step"] for record in records(uninterrupted) if "eval_loss" in record]
  assert held_out == list(range(0, STEPS + 1, 10))


def test_a_finished_run_prints_that_it_is_finished(
  run_trainer: RunTrainer, uninterrupted: Path
) -> None:
  before = (uninterrupted / "metrics.jsonl").read_text()
  status, output = run_trainer(uninterrupted, *OVERRIDES)
  assert status == 0, output
  assert f"all {STEPS} steps are done" in output
  assert (uninterrupted / "metrics.jsonl").read_text() == before


def test_another_config_is_an_error(run_trainer: RunTrainer, uninterrupted: Path) -> None:
  status, output = run_trainer(uninterrupted, *OVERRIDES, "--config.model.dga.group_size=8")
  assert status != 0
  assert "config.model.dga.group_size is 8" in output
  assert "Traceback" not in output
