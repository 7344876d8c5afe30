"""SIGTERM, SIGINT and SIGHUP to a run: before the first step, later, and repeated."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM

import pytest

from dga_jax.checkpoint_files import list_steps
from tests import compilation_cache
from tests.train.fleet import Fleet, wait_for_a_step, wait_for_output
from tests.train.tiny import interruptible, write_config
from train.config import TrainConfig
from train.stop_signals import EXIT_STATUS, StoppedError, StopSignals

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", [SIGTERM, SIGINT, SIGHUP])
def test_before_the_first_step_a_signal_raises(number: signal.Signals) -> None:
  before = signal.getsignal(number)
  with (
    StopSignals() as signals,
    pytest.raises(StoppedError, match=f"Stopped by {number.name} before the first step"),
  ):
    os.kill(os.getpid(), number)
  assert signals.asked
  assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [SIGTERM, SIGINT, SIGHUP])
def test_after_the_first_step_a_signal_requests_a_stop(
  number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
  threads = threading.active_count()
  with StopSignals() as signals:
    signals.defer()
    assert not signals.asked
    os.kill(os.getpid(), number)
    assert signals.asked
  assert f"{number.name}: the run saves its current step and stops" in caplog.text
  assert threading.active_count() == threads


def test_an_ignored_signal_stays_ignored() -> None:
  before = signal.signal(SIGHUP, signal.SIG_IGN)  # nohup does this.
  try:
    with StopSignals() as signals:
      os.kill(os.getpid(), SIGHUP)
      time.sleep(0.1)
    assert not signals.asked
    assert signal.getsignal(SIGHUP) is signal.SIG_IGN
  finally:
    signal.signal(SIGHUP, before)


def test_other_threads_install_no_handlers() -> None:
  before = signal.getsignal(SIGTERM)
  handlers = []

  def enter() -> None:
    with StopSignals():
      handlers.append(signal.getsignal(SIGTERM))

  thread = threading.Thread(target=enter)
  thread.start()
  thread.join()
  assert handlers == [before]


# The main thread sleeps in a C function, during which Python runs no signal handler. time.sleep
# would run it.
_BUSY = """
import ctypes, sys
from train.stop_signals import StopSignals
with StopSignals() as signals:
  signals.defer()
  print("busy", flush=True)
  while True:
    ctypes.CDLL(None).sleep(30)
"""


@pytest.mark.parametrize("first", [SIGTERM, SIGINT])
def test_a_second_ctrl_c_ends_a_busy_process_at_once(first: signal.Signals) -> None:
  command = [sys.executable, "-c", textwrap.dedent(_BUSY)]
  with subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "busy\n"
    process.send_signal(first)
    assert f"{first.name}: the run saves its current step" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(SIGINT)
    assert process.wait(10) == 130
    assert "Left at once, without saving." in process.stderr.read()


@pytest.fixture(scope="module")
def fleet(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
  config = interruptible(config, num_steps=2000, checkpoint_every=1000)
  path = write_config(config, tmp_path_factory.mktemp("fleet") / "long.py")
  return Fleet(path, str(compilation_cache.FOLDER))


@pytest.mark.parametrize("number", [SIGTERM, SIGINT, SIGHUP])
def test_a_run_saves_and_prints_how_to_continue(
  number: signal.Signals, fleet: Fleet, tmp_path: Path
) -> None:
  workdir = tmp_path / "run"
  (trainer,) = fleet.start(workdir, 1)
  wait_for_a_step([trainer], workdir)
  trainer.send(number)
  assert trainer.wait() == EXIT_STATUS == 75
  output = trainer.output()
  match = re.search(r"step (\d+) is saved, and the same command continues .*status 75", output)
  assert match, output
  assert list_steps(workdir) == [int(match[1])]
  assert "Traceback" not in output


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_a_signal_during_the_start_acts_before_the_first_step(
  number: signal.Signals, fleet: Fleet, tmp_path: Path
) -> None:
  workdir = tmp_path / "run"
  (trainer,) = fleet.start(workdir, 1)
  wait_for_output(trainer, "The prepared text and tokens are kept in")
  trainer.send(number)
  assert trainer.wait() == EXIT_STATUS
  output = trainer.output()
  assert f"Stopped by {number.name} before the first step. There is no checkpoint." in output
  assert "Traceback" not in output
  metrics = workdir / "metrics.jsonl"
  assert not metrics.exists() or '"loss"' not in metrics.read_text()
  assert list_steps(workdir) == []
