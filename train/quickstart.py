"""Trains the quickstart's model, generates text with it, and prints a summary.

  python -m train.quickstart

It runs two commands, train.main and dga_jax generate, and prints them.
"""

import contextlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

from dga_jax.checkpoint import list_steps
from dga_jax.files.path_flags import define_path
from train.metrics import FILE_NAME, read_metrics
from train.stop_signals import EXIT_STATUS

_RESTART = flags.DEFINE_bool("restart", False, "Delete the run in --workdir and start again.")
_CONFIG = define_path("config", "configs/quickstart.py", "Config file of the run.")
_WORKDIR = define_path("workdir", "runs/quickstart", "Folder of the run.")

PROMPT = '''class Stack:
    """A last-in, first-out stack."""

    def __init__(self, items=None):
'''


def main(argv: list[str]) -> None:
  """Runs the quickstart by the flags."""
  del argv
  workdir = Path(_WORKDIR.value)
  if _RESTART.value and workdir.exists():
    delete_run(workdir)
  sys.exit(quickstart(_CONFIG.value, workdir))


def delete_run(workdir: Path) -> None:
  """Deletes the folder of a run; exits if the folder is not one, or is in use as a work folder."""
  if not (workdir / "checkpoints").is_dir():
    sys.exit(f"--restart does not delete {workdir}: it has no checkpoints, so it is not a run.")
  if Path.cwd().is_relative_to(workdir.resolve()):
    sys.exit(f"--restart does not delete {workdir}: it contains the current folder.")
  shutil.rmtree(workdir)


def quickstart(config: str, workdir: Path) -> int:
  """Trains to the end or resumes the run in `workdir`, generates, and prints a summary.

  Returns:
    The exit status of the first command that failed, or 0.
  """
  start = time.perf_counter()
  before = list_steps(workdir)
  if before:
    _say(f"{workdir} has a run of {before[-1]} steps, which resumes; --restart starts again.")
  status = _run("train.main", f"--config={config}", f"--workdir={workdir}")
  if status == EXIT_STATUS:
    _say(f"The same command resumes the run in {workdir}; --restart starts again.")
    return status
  if status:
    _say(f"Training failed. The same command resumes the run in {workdir}; --restart starts again.")
    return status
  minutes = (time.perf_counter() - start) / 60
  status = _run(
    "dga_jax", "generate", f"--workdir={workdir}", f"--prompt={PROMPT}", "--max_new_tokens=200"
  )
  if status:
    return status
  took = "" if list_steps(workdir) == before else f"Training took {minutes:.1f} minutes.\n"
  _say(f"{took}{summary(workdir)}")
  return 0


def summary(workdir: Path) -> str:
  """The held-out loss at the start and at the end, and the paths of plots and checkpoints."""
  held_out = [record for record in read_metrics(workdir) if "eval_loss" in record]
  losses = "".join(
    f"Held-out loss at step {record['step']:>4}: {record['eval_loss']:.3f} nats per token, "
    f"{record['eval_bits_per_byte']:.2f} bits per byte\n"
    for record in (held_out[0], held_out[-1])
  )
  return (
    f"{losses}"
    f"Plots:       {workdir}/loss.png, {workdir}/loss_by_position.png\n"
    f"Metrics:     {workdir}/{FILE_NAME}, {workdir}/tensorboard\n"
    f"Checkpoints: {workdir}/checkpoints"
  )


def _run(module: str, *arguments: str) -> int:
  _say(f"$ python -m {module} {shlex.join(arguments)}")
  command = [sys.executable, "-m", module, *arguments]
  with subprocess.Popen(command) as process, _signals_are_for(process):
    return process.wait()


@contextlib.contextmanager
def _signals_are_for(process: subprocess.Popen[bytes]) -> Iterator[None]:
  """Leaves signals to a command: it saves its work, and this process waits for it.

  A terminal sends SIGINT to both processes, so it is not sent on: a second one would end training
  without saving.
  """
  before = {
    signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
    **{
      number: signal.signal(number, lambda number, _: process.send_signal(number))
      for number in (signal.SIGTERM, signal.SIGHUP)
      if signal.getsignal(number) is not signal.SIG_IGN
    },
  }
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _say(text: str) -> None:
  print(f"\n{text}", flush=True)


if __name__ == "__main__":
  app.run(main)
