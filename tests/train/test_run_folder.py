"""The folder of a run: local, or a temporary folder whose files are copied to the workdir."""

import dataclasses
from pathlib import Path

import pytest

from dga_jax.checkpoint_files import CheckpointError, set_aside
from dga_jax.files import lock, paths
from dga_jax.files.paths import check_path
from dga_jax.files.storage import to_path
from train import setup
from train.abort_filter import newest_checkpoint_note
from train.config import TrainConfig
from train.errors import TrainingError
from train.run_folder import open_run_folder, RunFolder


def test_in_the_file_system_a_run_writes_in_place(tmp_path: Path) -> None:
  (tmp_path / "metrics.jsonl").write_text("{}\n")
  with open_run_folder(tmp_path, "metrics.jsonl") as files:
    assert files.local == files.root == tmp_path
    files.publish()
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.fixture
def files(tmp_path: Path) -> RunFolder:
  """A run whose files are copied to a folder that has a subfolder `plots`."""
  for name in ("root", "local"):
    (tmp_path / name / "plots").mkdir(parents=True)
  return RunFolder(tmp_path / "root", tmp_path / "local")


def test_files_are_copied_when_they_have_changed(files: RunFolder) -> None:
  root, local = Path(files.root), files.local
  (local / "metrics.jsonl").write_text("one\n")
  (local / "plots" / "loss.png").write_bytes(b"png")
  files.publish()
  assert (root / "metrics.jsonl").read_text() == "one\n"
  assert (root / "plots" / "loss.png").read_bytes() == b"png"
  (root / "plots" / "loss.png").unlink()
  with (local / "metrics.jsonl").open("a") as file:
    file.write("two\n")
  files.publish()
  assert (root / "metrics.jsonl").read_text() == "one\ntwo\n"
  assert not (root / "plots" / "loss.png").exists()  # It has not changed.


def test_a_file_that_the_run_continues_is_fetched(files: RunFolder) -> None:
  files.fetch("metrics.jsonl")
  assert not (files.local / "metrics.jsonl").exists()
  (Path(files.root) / "metrics.jsonl").write_text("one\n")
  files.fetch("metrics.jsonl")
  assert (files.local / "metrics.jsonl").read_text() == "one\n"


def test_a_file_that_cannot_be_written(files: RunFolder) -> None:
  (Path(files.root) / "metrics.jsonl").mkdir()
  (files.local / "metrics.jsonl").write_text("one\n")
  with pytest.raises(TrainingError, match=r"root/metrics\.jsonl could not be written"):
    files.publish()


@pytest.fixture
def with_gcsfs(monkeypatch: pytest.MonkeyPatch) -> None:
  """Makes paths.py find the package for gs://, whether it is installed or not."""
  monkeypatch.setattr(paths, "_gcsfs_is_installed", lambda: True)


@pytest.mark.usefixtures("with_gcsfs")
def test_text_needs_a_folder_for_the_prepared_data(config: TrainConfig) -> None:
  workdir = to_path("gs://bucket/run")
  setup._check_storage(config, workdir)
  no_cache = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=None))
  with pytest.raises(
    ValueError, match=r"^config\.data\.cache_dir is None, and the workdir is 'gs:"
  ):
    setup._check_storage(no_cache, workdir)
  recall = dataclasses.replace(no_cache.data, kind="recall", sequence_length=128)
  setup._check_storage(dataclasses.replace(config, data=recall), workdir)


@pytest.mark.usefixtures("with_gcsfs")
def test_several_processes_need_a_shared_disk(
  config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  monkeypatch.setattr(setup.jax, "process_count", lambda: 2)
  setup._check_storage(config, tmp_path)
  with pytest.raises(
    ValueError, match=r"'gs://bucket/run', and the run has 2 processes; .* share\."
  ):
    setup._check_storage(config, to_path("gs://bucket/run"))


@pytest.mark.usefixtures("with_gcsfs")
@pytest.mark.parametrize("path", ["s3://bucket/run", "gs:/bucket/run", "gs://", "az://a/b"])
def test_other_stores_are_refused(path: str) -> None:
  check_path("--workdir", "gs://bucket/run", allow_gcs=True)
  with pytest.raises(ValueError, match=rf"^--workdir is '{path}'; .* or an address gs://BUCKET"):
    check_path("--workdir", path, allow_gcs=True)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(paths, "_gcsfs_is_installed", lambda: False)
  with pytest.raises(ValueError, match=r'^--workdir is .* pip install "dga-jax\[gcs\]"$'):
    check_path("--workdir", "gs://bucket/run", allow_gcs=True)


@pytest.mark.usefixtures("with_gcsfs")
def test_newer_checkpoints_in_a_store_are_not_renamed() -> None:
  with pytest.raises(CheckpointError, match=r"gs://bucket/run/checkpoints/9 is newer .* Move it"):
    set_aside("gs://bucket/run", 9)


def test_the_note_on_checkpoints_and_the_lock(caplog: pytest.LogCaptureFixture) -> None:
  assert newest_checkpoint_note("gs://bucket/run") == (
    "The checkpoints are in gs://bucket/run/checkpoints."
  )
  with lock.hold_workdir(to_path("gs://bucket/run")):
    assert "gs://bucket/run has no locks" in caplog.text
