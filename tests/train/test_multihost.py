"""Runs of two and four processes: the run of one, disturbed by real signals at random moments."""

import random
import re
import shutil
import time
from pathlib import Path
from signal import SIGKILL, SIGTERM
from types import SimpleNamespace

import numpy as np
import pytest

from dga_jax.checkpoint import list_steps
from tests.train.compare import assert_same_run, losses, saved_arrays
from tests.train.fleet import Fleet, stop_at_random, Trainer
from tests.train.tiny import interruptible, write_config
from train import multihost
from train.config import TrainConfig
from train.multihost import ProcessFlags
from train.setup import train

STEPS = 24
# Parameters in pieces over all devices, so that every process has some of its own to save.
SPLIT = "--config.mesh.fsdp=-1"
# What the processes say that are left: from a step, from a save, or from jax's watch over all.
BLAME = "most likely because one of them is gone|another process has failed|another task died"


@pytest.fixture(scope="module")
def small(config: TrainConfig) -> TrainConfig:
  return interruptible(config, num_steps=STEPS, checkpoint_every=3)


@pytest.fixture(scope="module")
def fleet(
  small: TrainConfig, compilation_cache: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Fleet:
  path = tmp_path_factory.mktemp("fleet") / "small.py"
  return Fleet(write_config(small, path), compilation_cache["jax_compilation_cache_dir"])


@pytest.fixture(scope="module")
def alone(small: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The run of one process."""
  workdir = tmp_path_factory.mktemp("alone")
  train(small, workdir)
  return workdir


@pytest.fixture(scope="module")
def two(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The run of two processes that nobody disturbs."""
  workdir = tmp_path_factory.mktemp("two") / "run"
  fleet.run(workdir, 2, SPLIT)
  return workdir


def test_two_processes_train_the_run_of_one(alone: Path, two: Path) -> None:
  assert list(losses(two)) == list(range(1, STEPS + 1))
  # Losses of different batches differ by more than a hundredth.
  np.testing.assert_allclose([*losses(two).values()], [*losses(alone).values()], rtol=1e-5)
  for ours, theirs in zip(saved_arrays(two, STEPS), saved_arrays(alone, STEPS), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def stopped_at(trainer: Trainer) -> int:
  match = re.search(r"Asked to stop: step (\d+) is saved", trainer.output())
  assert match, trainer.output()
  return int(match[1])


def test_signals_at_random_moments(fleet: Fleet, alone: Path, two: Path, tmp_path: Path) -> None:
  """SIGKILL to one process, then SIGTERM to one, then to the end: here, and in four processes."""
  workdir = tmp_path / "run"
  rng = random.Random(time.time_ns())
  trainers = fleet.start(workdir, 2, SPLIT)
  victims = stop_at_random(trainers, workdir, SIGKILL, rng, span=0.4)
  for trainer in trainers:
    status = trainer.wait(timeout=60)
    if trainer in victims:
      assert status == -SIGKILL
    else:
      assert status != 0
      assert re.search(BLAME, trainer.output()), trainer.output()

  trainers = fleet.start(workdir, 2, SPLIT)
  stop_at_random(trainers, workdir, SIGTERM, rng, span=0.4)
  assert [trainer.wait() for trainer in trainers] == [0, 0]
  step, *others = {stopped_at(trainer) for trainer in trainers}
  assert others == []
  assert list_steps(workdir)[-1] == step
  elsewhere = shutil.copytree(workdir, tmp_path / "elsewhere")

  fleet.run(workdir, 2, SPLIT)
  assert_same_run(workdir, two, STEPS)
  fleet.run(elsewhere, 4, SPLIT, "--config.mesh.data=2")
  np.testing.assert_allclose([*losses(elsewhere).values()], [*losses(alone).values()], rtol=1e-5)


def test_processes_that_disagree(fleet: Fleet, tmp_path: Path) -> None:
  workdir = tmp_path / "run"
  trainers = fleet.start(workdir, 2, overrides_of=["", "--config.learning_rate=0.5"])
  for trainer in trainers:
    assert trainer.wait() == 1
    assert (
      "ValueError: The processes of the run disagree: config.learning_rate is 0.01 in process 0 "
      "and 0.5 in 1. Start all of them with the same --config"
    ) in trainer.output()
    assert "Traceback" not in trainer.output()
  assert not workdir.exists()


def test_all_differences_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(multihost.jax, "process_count", lambda: 3)
  texts = [b'{"a": 1, "b": null}', b'{"a": 1, "b": [2]}', b'{"a": 3, "b": [2]}']
  monkeypatch.setattr(
    processes, "_gather", lambda local: texts if local.startswith(b"{") else [b"0", b"1", b"1"]
  )
  with pytest.raises(ValueError, match=r"a is 1 in process 0 and 3 in 2; b is None .*\[2\] in 1\."):
    multihost.check_agreement({"a": 1, "b": None}, "Mend it.")


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("here", 2, 0), "--coordinator is 'here'; it must be HOST:PORT"),
    (("h:1", None, 0), "--num_processes is None"),
    (("h:1", 2, 2), "--process_id is 2; it must be from 0 to 1"),
    (("auto", 2, None), "--coordinator is 'auto'; --num_processes and"),
    ((None, None, 1), "--coordinator is None; --num_processes and"),
  ],
)
def test_flags_without_sense(flags: tuple, message: str) -> None:
  with pytest.raises(ValueError, match=re.escape(message)):
    ProcessFlags(*flags)


def test_devices_must_be_shared_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
  devices = [SimpleNamespace(process_index=index) for index in (0, 0, 1)]
  monkeypatch.setattr(multihost.jax, "devices", lambda: devices)
  monkeypatch.setattr(multihost.jax, "process_count", lambda: 2)
  with pytest.raises(multihost.TrainingError, match=r"they have \[2, 1\]"):
    multihost._check_devices()
