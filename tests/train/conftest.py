"""Fixtures of a tiny training run, and of trainers in subprocesses."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dga_jax.conversion.hugging_face import HuggingFaceFolder
from dga_jax.conversion.importing import import_model
from tests.train.tiny import tiny_config, write_config, write_corpus
from train.config import TrainConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A folder with train-*.txt and held-out.txt, a few KB of random words."""
  folder = tmp_path_factory.mktemp("corpus")
  write_corpus(folder)
  return folder


@pytest.fixture(scope="session")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
  """A run of 12 steps with 4 sequences of 32 bytes, evaluated every 6 and saved every 3 steps."""
  return tiny_config(corpus, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def config_file(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The file of `config` for --config."""
  return write_config(config, tmp_path_factory.mktemp("configs") / "tiny.py")


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """An imported checkpoint in SmolLM's layout, with bfloat16 weights and a small vocabulary."""
  workdir = tmp_path_factory.mktemp("imported")
  source = HuggingFaceFolder(ROOT / "tests" / "golden" / "hugging_face" / "smollm")
  import_model(source, source.config(), workdir)
  return workdir


type StartTrainer = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="session")
def start_trainer(config_file: Path) -> StartTrainer:
  """A function (workdir, *overrides) -> Popen that starts `python -m train.main`."""
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}

  def start(workdir: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "train.main", f"--config={config_file}"]
    return subprocess.Popen(
      [*command, f"--workdir={workdir}", *overrides],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  return start


@pytest.fixture(scope="session")
def run_trainer(start_trainer: StartTrainer) -> Callable[..., tuple[int, str]]:
  """A function (workdir, *overrides) -> (exit status, output) that runs the trainer to its end."""

  def run(workdir: Path, *overrides: str) -> tuple[int, str]:
    process = start_trainer(workdir, *overrides)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output

  return run


@pytest.fixture(scope="session", autouse=True)
def _stop_signals_are_not_ignored() -> Iterator[None]:
  """Restores default handlers, because a background job ignores SIGINT and nohup ignores SIGHUP.

  Trainers in subprocesses would inherit the ignored signals.
  """
  handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
  before = {number: signal.getsignal(number) for number in handlers}
  ignored = [number for number in handlers if before[number] is signal.SIG_IGN]
  for number in ignored:
    signal.signal(number, handlers[number])
  yield
  for number in ignored:
    signal.signal(number, before[number])
