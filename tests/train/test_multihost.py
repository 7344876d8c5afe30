"""Runs of two and four processes equal the run of one process, also after real signals."""

import random
import re
import shutil
import signal
import time
from pathlib import Path
from signal import SIGKILL, SIGSTOP, SIGTERM
from types import SimpleNamespace

import numpy as np
import pytest

from dga_jax.checkpoint_files import list_steps
from tests import compilation_cache
from tests.train.compare import assert_same_run, losses, saved_arrays
from tests.train.fleet import Fleet, free_port, stop_at_random, Trainer, wait_for_a_step
from tests.train.tiny import interruptible, write_config
from train import multihost
from train.config import TrainConfig
from train.multihost import ProcessFlags
from train.setup import train
from train.stop_signals import EXIT_STATUS

STEPS = 24
# Parameters are sharded over all devices, so that every process saves some of them.
SPLIT = "--config.mesh.fsdp=-1"
# Messages of the remaining processes: from a step, from a save, or from JAX's heartbeats.
LOST_PROCESS = (
  "most likely because one of them is gone|another process (has failed|is gone)|not answer"
)
NEWEST_CHECKPOINT = r"The newest checkpoint is of step \d+\.|the checkpoint of step \d+ is intact"
SEED = 3


@pytest.fixture(scope="module")
def small(config: TrainConfig) -> TrainConfig:
  return interruptible(config, num_steps=STEPS, checkpoint_every=3)


@pytest.fixture(scope="module")
def fleet(small: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
  path = tmp_path_factory.mktemp("fleet") / "small.py"
  return Fleet(write_config(small, path), str(compilation_cache.FOLDER))


@pytest.fixture(scope="module")
def alone(small: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The workdir of the run of one process."""
  workdir = tmp_path_factory.mktemp("alone")
  train(small, workdir)
  return workdir


@pytest.fixture(scope="module")
def two(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The workdir of the uninterrupted run of two processes."""
  workdir = tmp_path_factory.mktemp("two") / "run"
  fleet.run(workdir, 2, SPLIT)
  return workdir


def test_two_processes_compute_the_run_of_one(alone: Path, two: Path) -> None:
  assert list(losses(two)) == list(range(1, STEPS + 1))
  # Losses of different batches differ by more than 0.01.
  np.testing.assert_allclose([*losses(two).values()], [*losses(alone).values()], rtol=1e-5)
  for ours, theirs in zip(saved_arrays(two, STEPS), saved_arrays(alone, STEPS), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def stopped_at(trainer: Trainer) -> int:
  match = re.search(r"Asked to stop: step (\d+) is saved", trainer.output())
  assert match, trainer.output()
  return int(match[1])


@pytest.mark.parametrize(
  "seed", [SEED, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(3))]
)
def test_signals_at_random_moments(
  seed: int, fleet: Fleet, alone: Path, two: Path, tmp_path: Path
) -> None:
  """A run is killed, restarted, stopped with SIGTERM, and completed by two and four processes."""
  workdir = tmp_path / "run"
  rng = random.Random(seed)
  trainers = fleet.start(workdir, 2, SPLIT)
  victims = stop_at_random(trainers, workdir, SIGKILL, rng, span=0.4)
  for trainer in trainers:
    status = trainer.wait(timeout=60)
    if trainer in victims:
      assert status == -SIGKILL
    else:
      assert status != 0
      trainer.wait_for_last_words(LOST_PROCESS)
      assert_no_cpp_stack(trainer)

  trainers = fleet.start(workdir, 2, SPLIT)
  stop_at_random(trainers, workdir, SIGTERM, rng, span=0.4)
  assert [trainer.wait() for trainer in trainers] == [EXIT_STATUS] * 2
  step, *others = {stopped_at(trainer) for trainer in trainers}
  assert others == []
  assert list_steps(workdir)[-1] == step
  elsewhere = shutil.copytree(workdir, tmp_path / "elsewhere")

  fleet.run(workdir, 2, SPLIT)
  assert_same_run(workdir, two, STEPS)
  fleet.run(elsewhere, 4, SPLIT, "--config.mesh.data=2")
  np.testing.assert_allclose([*losses(elsewhere).values()], [*losses(alone).values()], rtol=1e-5)


def assert_no_cpp_stack(trainer: Trainer) -> None:
  output = trainer.output()
  for text in ("stack trace", "Source Location", "SendToLog", "terminate called", "Traceback"):
    assert text not in output, output


@pytest.mark.parametrize(
  ("number", "victim"),
  [(SIGSTOP, 0), (SIGSTOP, 1), (SIGKILL, 0), pytest.param(SIGKILL, 1, marks=pytest.mark.nightly)],
)
def test_a_lost_process_is_reported_within_seconds(
  number: signal.Signals, victim: int, fleet: Fleet, tmp_path: Path
) -> None:
  workdir = tmp_path / "run"
  trainers = fleet.start(workdir, 2, SPLIT, "--config.num_steps=100000")
  wait_for_a_step(trainers, workdir)
  while not list_steps(workdir):
    time.sleep(0.01)
  trainers[victim].send(number)
  start = time.monotonic()
  other = trainers[1 - victim]
  assert other.wait(60) != 0
  seconds = time.monotonic() - start
  trainers[victim].send(SIGKILL)
  trainers[victim].wait()
  other.wait_for_last_words(LOST_PROCESS)
  other.wait_for_last_words(NEWEST_CHECKPOINT)
  assert_no_cpp_stack(other)
  assert seconds < 10


def test_processes_that_cannot_connect_end_with_a_sentence(fleet: Fleet, tmp_path: Path) -> None:
  """Covers the faults of `test_rendezvous` in real processes."""
  workdir = tmp_path / "run"
  (workdir / "checkpoints" / "12").mkdir(parents=True)
  port = free_port()
  flags = (f"--coordinator=127.0.0.1:{port}", "--num_processes=3", "--start_timeout=6")
  trainers = fleet.start(
    workdir, 3, *flags, process_overrides=["--process_id=0", "--process_id=1", "--process_id=1"]
  )
  assert [trainer.wait(60) for trainer in trainers] == [1, 1, 1]
  outputs = [trainer.output() for trainer in trainers]
  assert "TrainingError: Process 2 of 3 did not come within 6 s (--start_timeout)." in outputs[0]
  assert (
    sum("Two processes have --process_id=1. Give each" in output for output in outputs[1:]) == 1
  )
  assert sum("Process 2 of 3 did not come within 6 s" in output for output in outputs[1:]) == 1
  for trainer in trainers:
    assert "The newest checkpoint is of step 12." in trainer.output()
    assert_no_cpp_stack(trainer)


def test_a_second_run_in_a_workdir(fleet: Fleet, tmp_path: Path) -> None:
  """Every process of the second run reports the lock. The first run continues."""
  workdir = tmp_path / "run"
  steps = "--config.num_steps=100000"
  first = fleet.start(workdir, 2, SPLIT, steps)
  wait_for_a_step(first, workdir)
  logs = [trainer.log.rename(trainer.log.with_suffix(".first")) for trainer in first]
  second = fleet.start(workdir, 2, SPLIT, steps)
  assert [trainer.wait(60) for trainer in second] == [1, 1]
  for trainer in second:
    assert f"Error: Another process writes to {workdir}: " in trainer.output()
    assert_no_cpp_stack(trainer)
  for trainer in first:
    trainer.send(SIGTERM)
  assert [trainer.wait() for trainer in first] == [EXIT_STATUS] * 2
  assert all("is saved, and the same command continues" in log.read_text() for log in logs)
  steps_done = [*losses(workdir)]
  assert steps_done == list(range(1, len(steps_done) + 1))


def test_processes_with_different_configs_end_with_the_differences(
  fleet: Fleet, tmp_path: Path
) -> None:
  workdir = tmp_path / "run"
  trainers = fleet.start(workdir, 2, process_overrides=["", "--config.learning_rate=0.5"])
  for trainer in trainers:
    assert trainer.wait() == 1
    assert (
      "ValueError: The processes of the run disagree: config.learning_rate is 0.01 in process 0 "
      "and 0.5 in 1. Start all of them with the same flags."
    ) in trainer.output()
    assert "Traceback" not in trainer.output()
  assert not workdir.exists()


def test_all_differences_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(multihost.jax, "process_count", lambda: 3)
  texts = ['{"a": 1, "b": null}', '{"a": 1, "b": [2]}', '{"a": 3, "b": [2]}']
  monkeypatch.setattr(multihost, "_gather", lambda _: [b"same", b"other", b"other"])
  monkeypatch.setattr(multihost, "gather_texts", lambda _: texts)
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
def test_invalid_flags_are_errors(flags: tuple, message: str) -> None:
  with pytest.raises(ValueError, match=re.escape(message)):
    ProcessFlags(*flags)


def test_processes_must_have_equal_numbers_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
  devices = [SimpleNamespace(process_index=index) for index in (0, 0, 1)]
  monkeypatch.setattr(multihost.jax, "devices", lambda: devices)
  monkeypatch.setattr(multihost.jax, "process_count", lambda: 2)
  with pytest.raises(multihost.TrainingError, match=r"they have \[2, 1\]"):
    multihost._check_devices()
