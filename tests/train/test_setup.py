"""Training runs inside the test process: files, divergence, a full disk, changed data."""

import dataclasses
import gc
import itertools
import os
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dga_jax import DGAConfig
from dga_jax.checkpoint import load_model
from dga_jax.checkpoint_files import list_steps
from tests.train.tiny import interruptible
from train import setup
from train import step as step_module
from train.config import GuardConfig, TrainConfig
from train.data.pipeline import load_data
from train.errors import TrainingError
from train.metrics import read_metrics
from train.profile import ProfiledSteps
from train.setup import train
from train.step import Functions, make_functions, mean_gradient


def test_the_files_of_a_finished_run(config: TrainConfig, tmp_path: Path) -> None:
  train(config, tmp_path, profiled=ProfiledSteps.parse("2:3"))
  (profile,) = (tmp_path / "profile").rglob("*.xplane.pb")
  assert b"step_num" in profile.read_bytes()
  names = {name for record in read_metrics(tmp_path) for name in record}
  assert names >= {"loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu"}
  assert names >= {"host_memory_bytes", "data_wait_seconds"}
  held_out = [record for record in read_metrics(tmp_path) if "eval_loss" in record]
  assert [record["step"] for record in held_out] == [0, 6, 12]
  assert held_out[-1]["eval_loss"] < 0.8 * held_out[0]["eval_loss"]
  # The run keeps the two newest checkpoints and the best one, which is also the newest.
  assert list_steps(tmp_path) == [9, 12]
  for name in ("loss.png", "loss_by_position.png", "tensorboard"):
    assert (tmp_path / name).exists()
  model, model_config, tokenizer = load_model(tmp_path)
  assert model_config == config.model
  assert model(jax.numpy.array([tokenizer.encode("a key")])).shape == (1, 5, 257)


def test_dynamic_group_attention_trains(config: TrainConfig, tmp_path: Path) -> None:
  dga = DGAConfig(selection="streaming", group_size=6, focal_per_block=2)
  model = dataclasses.replace(config.model, attention="dga", dga=dga)
  train(dataclasses.replace(config, model=model), tmp_path)
  held_out = [record["eval_loss"] for record in read_metrics(tmp_path) if "eval_loss" in record]
  assert held_out[-1] < 0.8 * held_out[0]


def test_without_evaluation(config: TrainConfig, tmp_path: Path) -> None:
  train(dataclasses.replace(config, eval_batches=0), tmp_path)
  assert all("eval_loss" not in record for record in read_metrics(tmp_path))
  assert list_steps(tmp_path) == [9, 12]


def make_steps_nan(monkeypatch: pytest.MonkeyPatch, steps: set[int], name: str) -> None:
  """Makes the loss or the gradient of the given steps NaN.

  A negative token marks the batch. The patched gradient function returns NaN for such a batch.
  """

  def gradient_or_nan(config: TrainConfig, graphdef: Any, params: Any, batch: Any) -> Any:
    loss, accuracy, grads = mean_gradient(config, graphdef, params, batch)
    factor = jax.numpy.where(jax.numpy.any(batch["inputs"] < 0), jax.numpy.nan, 1.0)
    if name == "loss":
      return loss * factor, accuracy, grads
    return loss, accuracy, jax.tree.map(lambda x: x * factor, grads)

  def make_marking_functions(config: TrainConfig) -> Functions:
    functions = make_functions(config)
    mark = jax.jit(lambda batch: batch | {"inputs": batch["inputs"].at[0, 0].set(-1)})
    count = 0

    def step(state: Any, batch: Any) -> Any:
      nonlocal count
      count += 1
      return functions.step(state, mark(batch) if count in steps else batch)

    return dataclasses.replace(functions, step=step)

  monkeypatch.setattr(step_module, "mean_gradient", gradient_or_nan)
  monkeypatch.setattr(setup, "make_functions", make_marking_functions)


@pytest.mark.parametrize(
  ("broken_step", "name", "last_good"),
  [(9, "loss", 6), (10, "grad_norm", 9)],
)
def test_divergence_stops_the_run_before_it_is_saved(
  broken_step: int,
  name: str,
  last_good: int,
  config: TrainConfig,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  make_steps_nan(monkeypatch, {broken_step}, name)
  with pytest.raises(
    TrainingError, match=rf"diverged at step {broken_step}: .*checkpoint is of step {last_good}\."
  ):
    train(config, tmp_path)
  assert list_steps(tmp_path)[-1] == last_good
  assert [record["step"] for record in read_metrics(tmp_path)][-1] == broken_step - 1
  load_model(tmp_path)


def test_divergence_before_the_first_checkpoint(
  config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  make_steps_nan(monkeypatch, {1}, "loss")
  with pytest.raises(TrainingError, match=r"diverged at step 1: .*There is no checkpoint\."):
    train(config, tmp_path)


def skipping(config: TrainConfig, **changes: Any) -> TrainConfig:
  return dataclasses.replace(config, guard=GuardConfig(policy="skip", **changes))


def test_a_bad_step_is_skipped_and_its_batch_stored(
  config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  make_steps_nan(monkeypatch, {5, 8}, "grad_norm")
  train(skipping(config), tmp_path)
  records = {record["step"]: record for record in read_metrics(tmp_path) if "loss" in record}
  assert list(records) == list(range(1, 13))
  assert [step for step, record in records.items() if "skipped" in record] == [5, 8]
  assert records[5]["grad_norm"] is None
  assert records[5]["param_norm"] is None
  assert records[6]["param_norm"] == pytest.approx(records[4]["param_norm"], rel=0.05)
  assert list_steps(tmp_path) == [9, 12]

  data = load_data(config.data, tmp_path, seed=config.seed, batch_size=config.batch_size)
  batches = list(itertools.islice(data.train, 12))
  assert len(list((tmp_path / "bad_batches").iterdir())) == 2
  kept = np.load(tmp_path / "bad_batches" / "step_00000005_process_0_of_1.npz")
  assert kept["batch_index"] == 4
  for name, rows in batches[4].items():
    np.testing.assert_array_equal(kept[name], rows)


def test_too_many_bad_steps_in_a_row(
  config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  make_steps_nan(monkeypatch, {2, 3, 5, 6, 7}, "loss")
  with pytest.raises(
    TrainingError, match=r"step 7: loss nan.* last of 3 bad steps.*checkpoint is of step 6\."
  ):
    train(skipping(config, max_skipped=3), tmp_path)


def test_consecutive_bad_steps_are_counted_across_a_restart(
  config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  config = skipping(config, max_skipped=3)
  with pytest.MonkeyPatch.context() as patch:
    make_steps_nan(patch, {5, 6, 7}, "loss")
    with pytest.raises(TrainingError, match=r"step 7: .* last of 3 bad steps"):
      train(config, tmp_path)
  # The checkpoint of step 6 follows two bad steps. The next step is the third bad one.
  assert list_steps(tmp_path)[-1] == 6
  make_steps_nan(monkeypatch, {1}, "loss")
  with pytest.raises(TrainingError, match=r"step 7: .* last of 3 bad steps"):
    train(config, tmp_path)


def test_a_run_leaves_no_thread_and_no_open_file(config: TrainConfig, tmp_path: Path) -> None:
  config = interruptible(config, num_steps=4, checkpoint_every=2)

  def open_files() -> Counter[str]:
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    return Counter(str(link.readlink()) for link in links if link.is_symlink())

  train(config, tmp_path / "first")  # Libraries start threads that later runs reuse.
  gc.collect()  # Orbax's event loops are in reference cycles.
  # Files and threads of earlier tests may still close, so only new ones count.
  files, threads = open_files(), set(threading.enumerate())
  for name in ("second", "third"):
    train(config, tmp_path / name)
  assert set(threading.enumerate()) <= threads
  assert not [name for name in open_files() - files if "array_record" in name]
  gc.collect()
  assert open_files() <= files


def test_changed_data_are_an_error(config: TrainConfig, corpus: Path, tmp_path: Path) -> None:
  folder = tmp_path / "corpus"
  shutil.copytree(corpus, folder)
  data = dataclasses.replace(
    config.data,
    train_files=(str(folder / "train-*.txt"),),
    validation_files=(str(folder / "held-out.txt"),),
  )
  config = dataclasses.replace(config, data=data)
  with pytest.MonkeyPatch.context() as patch:
    make_steps_nan(patch, {5}, "loss")
    with pytest.raises(TrainingError, match="diverged"):
      train(config, tmp_path / "run")
  # Copies of the files in another folder are the same data.
  shutil.move(folder, tmp_path / "moved")
  data = dataclasses.replace(
    data,
    train_files=(str(tmp_path / "moved" / "train-*.txt"),),
    validation_files=(str(tmp_path / "moved" / "held-out.txt"),),
  )
  config = dataclasses.replace(config, data=data)
  assert train(config, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
  (tmp_path / "moved" / "train-0.txt").write_text("other words " * 400)
  prepared = sorted(Path(str(data.cache_dir)).iterdir())
  with pytest.raises(ValueError, match=r"order of the files of config\.data\.train_files.*changed"):
    train(config, tmp_path / "run")
  assert sorted(Path(str(data.cache_dir)).iterdir()) == prepared  # Checked before tokenizing.


def test_a_too_small_vocabulary_is_an_error(config: TrainConfig, tmp_path: Path) -> None:
  model = dataclasses.replace(config.model, vocab_size=256)
  with pytest.raises(ValueError, match=r"is 256; .* 257 .* lower config\.data\.vocab_size"):
    train(dataclasses.replace(config, model=model), tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
  """The path of a file system of 1.5 MB, which fits a few checkpoints of the tiny model."""
  path = tmp_path / "disk"
  path.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(path)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip("may not mount a file system")
  yield path
  subprocess.run(["umount", "-l", str(path)], check=True)


# A subprocess, because Orbax abandons its other writes when one fails.
def test_a_full_disk(
  config: TrainConfig, run_trainer: Callable[..., tuple[int, str]], small_disk: Path
) -> None:
  settings = {"keep_checkpoints": 100, "checkpoint_every": 1, "num_steps": 60}
  status, output = run_trainer(
    small_disk, *(f"--config.{name}={value}" for name, value in settings.items())
  )
  assert status == 1
  # A checkpoint, the metrics or the event file meets the end of the disk first.
  *_, message = re.findall(r"^\w+Error: .*", output, re.MULTILINE)
  assert all(part in message for part in ("No space left", f"{small_disk}/", "Make room")), output
  steps = list_steps(small_disk)
  assert re.search(rf"checkpoint (is )?of step {steps[-1]}\b", message), output
  assert 1 <= steps[-1] < 60
  load_model(small_disk)
  # With free space the same run continues from its checkpoint.
  for step in steps[:-1]:
    shutil.rmtree(small_disk / "checkpoints" / str(step))
  config = dataclasses.replace(config, keep_checkpoints=1, checkpoint_every=20, num_steps=60)
  train(config, small_disk)
  records = [record["step"] for record in read_metrics(small_disk) if "loss" in record]
  assert records == list(range(1, 61))
