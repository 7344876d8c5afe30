"""Training on all GPUs of a machine over NCCL: killed, stopped, and resumed, also on fewer GPUs.

python -m pytest -m gpu tests/train/test_gpus.py
"""

import dataclasses
import random
import re
import shutil
import time
from pathlib import Path
from signal import SIGKILL, SIGTERM

import jax
import pytest

from dga_jax.checkpoint import list_steps
from dga_jax.config import DGAConfig
from tests import compilation_cache
from tests.train.compare import assert_same_run, losses
from tests.train.fleet import Fleet, Trainer, wait_for_a_step
from tests.train.test_multihost import LOST_PROCESS, SPLIT, stopped_at
from tests.train.tiny import interruptible, write_config
from train.config import TrainConfig
from train.stop_signals import EXIT_STATUS

STEPS = 400
# Signals are sent up to this many seconds after the first new step, long before the run ends.
SPAN = 1.0
SEED = 0


@pytest.fixture(scope="module")
def fleet(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
  """Starts runs of a decoder that uses DGA's GPU kernels."""
  if jax.device_count() < 2:
    pytest.skip(f"needs two GPUs, and there is {jax.device_count()}")
  config = interruptible(config, num_steps=STEPS, checkpoint_every=20)
  model = dataclasses.replace(
    config.model,
    attention="dga",
    dga=DGAConfig(selection="streaming"),
    embed_dim=128,
    head_dim=64,
    dtype="bfloat16",
  )
  data = dataclasses.replace(config.data, sequence_length=256)
  config = dataclasses.replace(config, model=model, data=data, batch_size=8, learning_rate=1e-3)
  path = write_config(config, tmp_path_factory.mktemp("fleet") / "small.py")
  return Fleet(path, str(compilation_cache.FOLDER), on_gpus=True)


@pytest.fixture(scope="module")
def uninterrupted(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
  workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
  timed(fleet.run, workdir, jax.device_count(), SPLIT)
  return workdir


def timed(run, workdir: Path, *arguments):
  """Calls `run` and prints how long it took."""
  start = time.monotonic()
  result = run(workdir, *arguments)
  print(f"{workdir.name}: {time.monotonic() - start:.1f} s", flush=True)
  return result


@dataclasses.dataclass(frozen=True)
class Interrupted:
  """A run with one process per GPU that was killed, resumed, and stopped with SIGTERM.

  Attributes:
    workdir: folder of the run, with the checkpoint that was saved after the SIGTERM.
    killed: exit statuses after the SIGKILL. The first is that of the killed process.
    outputs: the output of each other process.
    stopped: exit statuses after the SIGTERM.
    steps: the step at which each process stopped after the SIGTERM.
  """

  workdir: Path
  killed: list[int]
  outputs: list[str]
  stopped: list[int]
  steps: list[int]


@pytest.fixture(scope="module")
def interrupted(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
  workdir = tmp_path_factory.mktemp("interrupted") / "run"
  rng = random.Random(SEED)
  gpus = jax.device_count()
  trainers = fleet.start(workdir, gpus, SPLIT)
  victim, *others = rng.sample(trainers, gpus)
  send(SIGKILL, victim, trainers, workdir, rng)
  killed = wait_for_all([victim, *others], 60)
  outputs = [trainer.output() for trainer in others]

  trainers = fleet.start(workdir, gpus, SPLIT)
  send(SIGTERM, rng.choice(trainers), trainers, workdir, rng)
  stopped = wait_for_all(trainers, 120)
  steps = [stopped_at(trainer) for trainer in trainers]
  print(f"stopped after steps {steps}", flush=True)
  return Interrupted(workdir, killed, outputs, stopped, steps)


def send(
  number: int, victim: Trainer, trainers: list[Trainer], workdir: Path, rng: random.Random
) -> None:
  wait_for_a_step(trainers, workdir)
  time.sleep(rng.uniform(0, SPAN))
  victim.send(number)


def wait_for_all(trainers: list[Trainer], seconds: float) -> list[int]:
  start = time.monotonic()
  statuses = [trainer.wait(seconds) for trainer in trainers]
  print(f"all had ended after {time.monotonic() - start:.1f} s: {statuses}", flush=True)
  return statuses


@pytest.mark.gpu
def test_after_a_kill_the_other_processes_report_it_and_stop(interrupted: Interrupted) -> None:
  victim, *others = interrupted.killed
  assert victim == -SIGKILL
  assert all(others)
  for output in interrupted.outputs:
    assert re.search(LOST_PROCESS, output), output


@pytest.mark.gpu
def test_sigterm_to_one_process_stops_all_after_the_same_step(interrupted: Interrupted) -> None:
  assert set(interrupted.stopped) == {EXIT_STATUS}
  (step,) = set(interrupted.steps)
  assert step < STEPS
  assert list_steps(interrupted.workdir)[-1] == step


@pytest.mark.gpu
@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_the_run_resumes_on_fewer_gpus(
  fleet: Fleet, interrupted: Interrupted, uninterrupted: Path, tmp_path: Path, gpus: int
) -> None:
  if gpus >= jax.device_count():
    pytest.skip(f"needs more than {gpus} GPUs, and there is {jax.device_count()}")
  workdir = shutil.copytree(interrupted.workdir, tmp_path / "run")
  step = interrupted.steps[0]
  timed(fleet.run, workdir, gpus, SPLIT)
  ours, theirs = losses(workdir), losses(uninterrupted)
  assert list(ours) == list(theirs)
  apart = {at: abs(loss / theirs[at] - 1) for at, loss in ours.items()}
  most = max(apart.values())
  print(f"from step {step} on {gpus} GPUs: losses differ by {most:.1e} at most", flush=True)
  assert not any(x for at, x in apart.items() if at <= step)
  # Losses of different batches differ by more. Later, bfloat16 rounding separates the runs.
  assert max(x for at, x in apart.items() if at <= step + 40) < 1e-2


@pytest.mark.gpu
def test_the_run_resumes_bit_for_bit(
  fleet: Fleet, interrupted: Interrupted, uninterrupted: Path, tmp_path: Path
) -> None:
  workdir = shutil.copytree(interrupted.workdir, tmp_path / "run")
  timed(fleet.run, workdir, jax.device_count(), SPLIT)
  assert_same_run(workdir, uninterrupted, STEPS)
