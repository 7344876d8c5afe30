"""The loop in this process: what a run leaves, divergence, a full disk, changed data."""

import dataclasses
import gc
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from dga_jax import DGAConfig
from dga_jax.checkpoint import list_steps, load_model
from train import loop
from train.config import TrainConfig
from train.errors import TrainingError
from train.loop import train
from train.metrics import read_metrics
from train.step import Functions, make_functions


def test_what_a_run_leaves(config: TrainConfig, tmp_path: Path) -> None:
  train(config, tmp_path)
  held_out = [record for record in read_metrics(tmp_path) if "eval_loss" in record]
  assert [record["step"] for record in held_out] == [0, 6, 12]
  assert held_out[-1]["eval_loss"] < 0.8 * held_out[0]["eval_loss"]
  # The two newest, the last of which is the best too.
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


def break_step(monkeypatch: pytest.MonkeyPatch, broken_step: int, name: str) -> None:
  """Makes one step's scalar, and with it the parameters, not a number."""

  def make_broken(config: TrainConfig) -> Functions:
    functions = make_functions(config)
    count = 0

    def step(state: Any, batch: Any) -> Any:
      nonlocal count
      count += 1
      state, scalars = functions.step(state, batch)
      if count == broken_step:
        nan = jax.jit(lambda x: x * float("nan"))
        state = dataclasses.replace(state, params=jax.tree.map(nan, state.params))
        scalars = scalars | {name: nan(scalars[name])}
      return state, scalars

    return dataclasses.replace(functions, step=step)

  monkeypatch.setattr(loop, "make_functions", make_broken)


@pytest.mark.parametrize(
  ("broken_step", "name", "last_good"),
  [(7, "loss", 6), (9, "param_norm", 6), (10, "grad_norm", 9)],
)
def test_divergence_stops_before_a_checkpoint_takes_it(
  broken_step: int,
  name: str,
  last_good: int,
  config: TrainConfig,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  break_step(monkeypatch, broken_step, name)
  with pytest.raises(
    TrainingError, match=rf"diverged at step {broken_step}: .*checkpoint of step {last_good}\."
  ):
    train(config, tmp_path)
  assert list_steps(tmp_path)[-1] == last_good
  assert [record["step"] for record in read_metrics(tmp_path)][-1] == broken_step - 1
  load_model(tmp_path)


def test_divergence_before_the_first_checkpoint(
  config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  break_step(monkeypatch, 1, "loss")
  with pytest.raises(TrainingError, match=r"diverged at step 1: .*There is no checkpoint\."):
    train(config, tmp_path)


def test_other_data_are_refused(config: TrainConfig, corpus: Path, tmp_path: Path) -> None:
  folder = tmp_path / "corpus"
  shutil.copytree(corpus, folder)
  data = dataclasses.replace(
    config.data,
    train_files=(str(folder / "train-*.txt"),),
    validation_files=(str(folder / "held-out.txt"),),
  )
  config = dataclasses.replace(config, data=data)
  with pytest.MonkeyPatch.context() as patch:
    break_step(patch, 5, "loss")
    with pytest.raises(TrainingError, match="diverged"):
      train(config, tmp_path / "run")
  (folder / "train-0.txt").write_text("other words " * 400)
  with pytest.raises(ValueError, match="data files are not those"):
    train(config, tmp_path / "run")


def test_a_vocabulary_too_small(config: TrainConfig, tmp_path: Path) -> None:
  model = dataclasses.replace(config.model, vocab_size=256)
  with pytest.raises(ValueError, match=r"config\.model\.vocab_size is 256; .* 257 entries"):
    train(dataclasses.replace(config, model=model), tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
  """A file system of 1.5 MB: room for a few checkpoints of the tiny model."""
  path = tmp_path / "disk"
  path.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(path)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip("may not mount a file system")
  yield path
  gc.collect()  # Orbax's abandoned tasks complain when they are collected: here, not at the end.
  subprocess.run(["umount", "-l", str(path)], check=True)


# Orbax abandons its other writes when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk(config: TrainConfig, small_disk: Path) -> None:
  config = dataclasses.replace(config, keep_checkpoints=100, checkpoint_every=1, num_steps=60)
  # CheckpointError or TrainingError: whichever file meets the end of the disk first.
  with pytest.raises(RuntimeError, match=r"No space left.*checkpoint of step \d+"):
    train(config, small_disk)
  steps = list_steps(small_disk)
  assert 1 <= steps[-1] < 60
  load_model(small_disk)
  # With room again, the same run goes on from there.
  for step in steps[:-1]:
    shutil.rmtree(small_disk / "checkpoints" / str(step))
  train(dataclasses.replace(config, keep_checkpoints=1, checkpoint_every=20), small_disk)
  records = [record["step"] for record in read_metrics(small_disk) if "loss" in record]
  assert records == list(range(1, 61))
