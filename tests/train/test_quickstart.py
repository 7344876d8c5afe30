"""The quickstart on a tiny config trains, generates, and prints the paths of its files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dga_jax.checkpoint_files import list_steps
from tests.train.tiny import interruptible, write_config
from train import quickstart
from train.config import TrainConfig
from train.stop_signals import EXIT_STATUS

ROOT = Path(__file__).parents[2]


def test_trains_generates_and_sums_up(
  config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
  assert quickstart.quickstart(str(config_file), tmp_path / "run") == 0
  shown, figures = capfd.readouterr()
  first, last = (
    float(line.split(":")[1].split()[0])
    for line in shown.splitlines()
    if line.startswith("Held-out loss at step")
  )
  assert last < first
  assert "tokens/s" in figures
  for line in shown.splitlines():
    if line.startswith(("Plots:", "Metrics:", "Checkpoints:")):
      paths = line.partition(":")[2].split(",")
      assert all(Path(path.strip()).exists() for path in paths)


def test_a_failure_of_training_is_the_exit_status(
  tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
  assert quickstart.quickstart(str(tmp_path / "no_config.py"), tmp_path / "run") != 0
  assert "Training failed" in capfd.readouterr().out


@pytest.mark.nightly  # tests/train/test_stop_signals.py sends signals to the trainer itself.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_its_training_process(
  number: signal.Signals, config: TrainConfig, tmp_path: Path
) -> None:
  config = interruptible(config, num_steps=10**6, checkpoint_every=10**6)
  long = write_config(config, tmp_path / "long.py")
  workdir = tmp_path / "run"
  command = [sys.executable, "-m", "train.quickstart", f"--config={long}", f"--workdir={workdir}"]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  with subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
  ) as process:
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
      time.sleep(0.05)
    # A terminal sends SIGINT to all foreground processes; a scheduler sends SIGTERM to the first.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=120)
  assert process.returncode == EXIT_STATUS
  assert "The same command resumes the run" in output
  assert len(list_steps(workdir)) == 1


def test_restart_deletes_only_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  folder = tmp_path / "folder"
  (folder / "notes").mkdir(parents=True)
  with pytest.raises(SystemExit, match="has no checkpoints"):
    quickstart.delete_run(folder)
  (folder / "checkpoints").mkdir()
  monkeypatch.chdir(folder / "notes")
  with pytest.raises(SystemExit, match="contains the current folder"):
    quickstart.delete_run(folder)
  monkeypatch.chdir(tmp_path)
  quickstart.delete_run(folder)
  assert not folder.exists()
