"""Runs with damaged checkpoints or metrics.jsonl, and two trainers in one workdir."""

import dataclasses
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dga_jax.checkpoint_files import CheckpointError, find_damage, list_steps
from dga_jax.files.lock import hold_workdir, LockedError
from tests import compilation_cache
from tests.dga_jax.tiny_checkpoint import delete_item, flip_a_bit, largest_file, truncate
from tests.train.compare import assert_same_run
from tests.train.fleet import Fleet
from tests.train.tiny import interruptible, write_config
from train import setup
from train.config import TrainConfig
from train.metrics import read_metrics
from train.plots import plot_run
from train.resume import Position, Resume
from train.setup import train

ITEMS = ("params", "training", "config", "tokenizer", "data", "verification")


@pytest.fixture(scope="module")
def config(config: TrainConfig) -> TrainConfig:
  """A config that saves the steps 2, 4, ..., 12 and keeps them all."""
  config = interruptible(config, num_steps=12, checkpoint_every=2)
  return dataclasses.replace(config, keep_checkpoints=9)


@pytest.fixture(scope="module")
def whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
  workdir = tmp_path_factory.mktemp("whole")
  train(config, workdir)
  return workdir


@pytest.fixture
def workdir(whole: Path, tmp_path: Path) -> Path:
  """The folder of the run after step 8."""
  workdir = shutil.copytree(whole, tmp_path / "run")
  for step in (10, 12):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  return workdir


def fill_with_nul(path: Path) -> None:
  path.write_bytes(b"\0" * path.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, fill_with_nul, Path.unlink, delete_item])
@pytest.mark.parametrize("item", ITEMS)
def test_damage_to_the_newest_checkpoint_of_a_run(
  item: str, damage: Callable[[Path], None], config: TrainConfig, workdir: Path
) -> None:
  damage(largest_file(workdir / "checkpoints" / "8" / item))
  match = (
    r"checkpoints/8 is damaged: .*last good one is of step 6: use it with --step=6, or move .*/8 "
    r"away\. With --skip_damaged training continues"
  )
  with pytest.raises(CheckpointError, match=match):
    train(config, workdir)
  assert list_steps(workdir) == [2, 4, 6, 8]


@pytest.mark.parametrize("resume", [Resume(skip_damaged=True), Resume(step=6)])
def test_training_continues_from_the_last_good_checkpoint(
  resume: Resume,
  config: TrainConfig,
  workdir: Path,
  whole: Path,
  caplog: pytest.LogCaptureFixture,
) -> None:
  flip_a_bit(largest_file(workdir / "checkpoints" / "8" / "training"))
  with caplog.at_level("INFO"):
    assert train(config, workdir, resume=resume)
  assert "Continuing from the checkpoint of step 6." in caplog.text
  assert "of step 8 is set aside as" in caplog.text
  assert_same_run(workdir, whole, 12)
  assert find_damage(workdir, 8) is None
  # The damaged checkpoint is renamed, not deleted.
  assert (workdir / "checkpoints" / "8.set_aside_1" / "training").is_dir()


def test_the_flags_of_the_command(config: TrainConfig, workdir: Path, whole: Path) -> None:
  path = write_config(config, workdir.with_suffix(".py"))
  fleet = Fleet(path, str(compilation_cache.FOLDER))
  flip_a_bit(largest_file(workdir / "checkpoints" / "8" / "params"))
  for flags, status, message in (
    ((), 1, "CheckpointError: The checkpoint .*/8 is damaged: .* --skip_damaged"),
    (("--step=8",), 1, "use it with --step=6"),
    (("--step=4", "--skip_damaged"), 1, "ValueError: --step is 4 and --skip_damaged is set"),
    (("--skip_damaged",), 0, "Continuing from the checkpoint of step 6."),
    (("--step=10",), 0, "Continuing from the checkpoint of step 10."),
  ):
    (trainer,) = fleet.start(workdir, 1, *flags)
    assert trainer.wait() == status, trainer.output()
    assert re.search(message, trainer.output()), trainer.output()
    assert "Traceback" not in trainer.output()
  assert_same_run(workdir, whole, 12)


def test_several_damaged_checkpoints(config: TrainConfig, workdir: Path, whole: Path) -> None:
  for step, item in ((8, "params"), (6, "config")):
    truncate(largest_file(workdir / "checkpoints" / str(step) / item))
  with pytest.raises(CheckpointError, match=r"/8 is damaged: .* good one is of step 4"):
    train(config, workdir)
  with pytest.raises(CheckpointError, match=r"/6 is damaged: .* good one is of step 4"):
    train(config, workdir, resume=Resume(step=6))
  train(config, workdir, resume=Resume(skip_damaged=True))
  assert_same_run(workdir, whole, 12)


def test_a_run_without_an_undamaged_checkpoint_is_an_error(
  config: TrainConfig, workdir: Path
) -> None:
  for step in (2, 4, 6, 8):
    flip_a_bit(largest_file(workdir / "checkpoints" / str(step) / "data"))
  with pytest.raises(CheckpointError, match="No other checkpoint there is whole"):
    train(config, workdir, resume=Resume(skip_damaged=True))
  assert list_steps(workdir) == [2, 4, 6, 8]


def test_the_step_flag_selects_the_checkpoint(
  config: TrainConfig, workdir: Path, whole: Path
) -> None:
  with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 in .*\[2, 4, 6, 8\]"):
    train(config, workdir, resume=Resume(step=5))
  train(config, workdir, resume=Resume(step=4))
  assert_same_run(workdir, whole, 12)
  names = {path.name for path in (workdir / "checkpoints").iterdir()}
  assert {"6.set_aside_1", "8.set_aside_1"} <= names
  with pytest.raises(ValueError, match="--step is 4 and --skip_damaged is set"):
    Resume(step=4, skip_damaged=True)


def test_a_renamed_step_folder(config: TrainConfig, workdir: Path) -> None:
  (workdir / "checkpoints" / "8").rename(workdir / "checkpoints" / "10")
  with pytest.raises(CheckpointError, match=r"/10 is damaged: its manifest is of step 8\."):
    train(config, workdir)


def without_manifest(workdir: Path, step: int) -> Path:
  """Gives a checkpoint the form before manifests, so that only the trainer's own checks apply."""
  folder = workdir / "checkpoints" / str(step)
  (folder / "verification").rename(folder / "checksums")
  return folder


def test_the_data_position_must_match_the_step(
  config: TrainConfig, workdir: Path, whole: Path
) -> None:
  folder = without_manifest(workdir, 8)
  path = folder / "data" / "metadata"
  for position in ({"next_batch": 7}, {"next_batch": "8"}, {}):
    path.write_text(json.dumps(position))
    with pytest.raises(CheckpointError, match=r"position .*/8/data is not that of step 8"):
      train(config, workdir)
  path.write_text(json.dumps({"next_batch": 8}))
  train(config, workdir)
  assert_same_run(workdir, whole, 12)


def test_the_training_state_must_match_the_step(config: TrainConfig, workdir: Path) -> None:
  folder = without_manifest(workdir, 8)
  shutil.rmtree(folder / "training")
  shutil.copytree(workdir / "checkpoints" / "6" / "training", folder / "training")
  with pytest.raises(CheckpointError, match=r"state in the checkpoint of step 8 .* that of step 6"):
    train(config, workdir)


@pytest.mark.parametrize(
  "line",
  [b"\0" * 300, b'{"step": 3, "loss"', b"", b"[]", b'{"loss": 1.0}', b'{"step": "3"}', b"\xff\xfe"],
)
def test_an_unreadable_line_of_metrics(
  line: bytes, config: TrainConfig, workdir: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
  path = workdir / "metrics.jsonl"
  lines = path.read_bytes().split(b"\n")
  path.write_bytes(b"\n".join([*lines[:3], line, *lines[3:]]))
  train(config, workdir)
  assert f"{path}, line 4, is skipped: " in caplog.text
  assert_same_run(workdir, whole, 12)


def test_mutated_metrics_are_read_and_plotted(whole: Path, tmp_path: Path) -> None:
  rng = random.Random(0)
  content = (whole / "metrics.jsonl").read_bytes()
  path = tmp_path / "metrics.jsonl"
  for number in range(200):
    path.write_bytes(mutate(content, rng))
    records = read_metrics(tmp_path)
    assert all(isinstance(record["step"], int) for record in records)
    if number % 40 == 0:
      plot_run(tmp_path, title="a run")


def mutate(content: bytes, rng: random.Random) -> bytes:
  """Flips a bit, truncates, deletes, repeats or zeroes some bytes, or inserts nested brackets."""
  start, stop = sorted(rng.sample(range(len(content)), 2))
  stop = min(stop, start + 40)
  before, piece, after = content[:start], content[start:stop], content[stop:]
  return rng.choice(
    (
      before + bytes([piece[0] ^ 1 << rng.randrange(8)]) + piece[1:] + after,
      before,
      before + after,
      before + piece + piece + after,
      before + b"\0" * len(piece) + after,
      before + b"[" * 100_000 + after,
      before + b"-1e999" + after,
    )
  )


def test_a_second_trainer_is_refused(config: TrainConfig, workdir: Path) -> None:
  before = (workdir / "metrics.jsonl").read_bytes()
  match = r"Another process writes to .*/run: .*\.lock is locked by process \d+ on .*\. Wait for it"
  with hold_workdir(workdir), pytest.raises(LockedError, match=match):
    train(config, workdir)
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_float16_parameters_are_refused_before_anything_is_written(
  config: TrainConfig, tmp_path: Path
) -> None:
  model = dataclasses.replace(config.model, param_dtype="float16")
  with pytest.raises(ValueError, match=r"config\.model\.param_dtype is 'float16'.*Use 'float32'"):
    train(dataclasses.replace(config, model=model), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_float16_activations_are_warned_about(
  config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
  model = dataclasses.replace(config.model, dtype="float16")
  setup._check_dtypes(dataclasses.replace(config, model=model))
  assert "config.model.dtype is 'float16': the trainer does not scale the loss" in caplog.text


def test_position() -> None:
  values: dict[str, Any] = Position(7, 7, 2).to_dict()
  assert Position.from_dict(values, Path("run"), 7) == Position(7, 7, 2)
  assert (Position().steps_done, Position(3, 3).steps_done) == (0, 3)
