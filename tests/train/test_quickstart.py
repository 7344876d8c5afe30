"""The quickstart on a tiny config: it trains, generates, and prints the paths of its files."""

from pathlib import Path

import pytest

from train import quickstart


def test_trains_generates_and_sums_up(
  config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
  assert quickstart.quickstart(str(config_file), tmp_path / "run") == 0
  shown = capfd.readouterr().out
  first, last = (
    float(line.split(":")[1].split()[0])
    for line in shown.splitlines()
    if line.startswith("Held-out loss at step")
  )
  assert last < first
  assert "tokens/s" in shown
  for line in shown.splitlines():
    if line.startswith(("Plots:", "Metrics:", "Checkpoints:")):
      paths = line.partition(":")[2].split(",")
      assert all(Path(path.strip()).exists() for path in paths)


def test_a_failure_of_training_is_passed_on(
  tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
  assert quickstart.quickstart(str(tmp_path / "no_config.py"), tmp_path / "run") != 0
  assert "Training failed" in capfd.readouterr().out


def test_restart_deletes_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
