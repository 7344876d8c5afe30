r"""Trains a decoder.

  python -m train.main --config=configs/quickstart.py --workdir=runs/mine \
    --config.learning_rate=1e-3

The same command again continues from the newest checkpoint. --config.KEY=VALUE
changes a key; the keys are listed below.

SIGTERM, SIGHUP or Ctrl-C saves the current step and stops with exit status 75;
the same command then continues. A second Ctrl-C stops at once, without saving,
with exit status 130. The exit status is 0 after the last step, and 1 after an
error.

A run of several processes is the same command in each of them, here with two
processes on one machine:

  python -m train.main --config=configs/quickstart.py --workdir=runs/mine \
    --coordinator=127.0.0.1:8476 --num_processes=2 --process_id=0  # and 1
"""

import signal
import sys
import traceback
from typing import NoReturn

from absl import app, flags, logging

from dga_jax import command_line
from dga_jax.files.path_flags import define_path

# jax is imported after the flags are parsed, so that --help and wrong flags are answered at once.
from train.abort_filter import newest_checkpoint_note
from train.errors import TrainingError
from train.flags import define_config_flag, parse_flags
from train.logs import set_up_logging
from train.stop_signals import EXIT_STATUS, StoppedError, StopSignals

_CONFIG = define_config_flag()
_WORKDIR = define_path(
  "workdir",
  None,
  "Folder of the run: checkpoints, metrics, plots. A path, or gs://BUCKET/FOLDER.",
  required=True,
  allow_gcs=True,
)
_STEP = flags.DEFINE_integer(
  "step",
  None,
  "Continue from the checkpoint of this step; newer ones are renamed. Default: newest.",
)
_SKIP_DAMAGED = flags.DEFINE_bool(
  "skip_damaged",
  False,
  "Where the newest checkpoint is damaged, continue from the newest whole one; rename the others.",
)
_REPAIR_DATA = flags.DEFINE_bool(
  "repair_data", False, "If the prepared data are damaged, prepare them anew from the text files."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "HOST:PORT of process 0, for a run of several processes; 'auto' on a TPU pod, under Slurm and "
  "Open MPI, which tell the processes of each other.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_START_TIMEOUT = flags.DEFINE_float(
  "start_timeout", 300.0, "Seconds to wait for missing processes of the run.", lower_bound=1.0
)
_PROFILE = flags.DEFINE_string("profile", None, "N:M takes a profile of the steps N to M.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
  """Trains by the flags."""
  del argv
  set_up_logging()
  command_line.repeat_if_ignored(StoppedError, signal.SIGTERM)
  workdir = _WORKDIR.value
  try:
    with StopSignals() as signals:
      is_finished = _train(workdir, signals)
  except StoppedError as error:
    note = f"{newest_checkpoint_note(workdir)} The same command continues."
    _end(EXIT_STATUS, f"{error} {note} (Exit status {EXIT_STATUS}.)")
  except Exception as error:
    _end(1, _describe(error))
  if not is_finished:
    sys.exit(EXIT_STATUS)


def _train(workdir: str, signals: StopSignals) -> bool:
  from dga_jax.files.storage import to_path
  from train import multihost
  from train.config import make_config
  from train.profile import ProfiledSteps
  from train.resume import Resume
  from train.setup import train

  profiled = None if _PROFILE.value is None else ProfiledSteps.parse(_PROFILE.value)
  config = make_config(_CONFIG.value)
  processes = multihost.ProcessFlags(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  try:
    multihost.start(processes, workdir, timeout=_START_TIMEOUT.value)
  except TrainingError as error:
    raise TrainingError(f"{error} {newest_checkpoint_note(workdir)}") from error
  return train(
    config,
    to_path(workdir),
    profiled=profiled,
    resume=Resume(_STEP.value, _SKIP_DAMAGED.value),
    repair_data=_REPAIR_DATA.value,
    signals=signals,
  )


def _describe(error: Exception) -> str:
  """The message of an error that the user can repair; of any other one the traceback."""
  from dga_jax.checkpoint_files import CheckpointError

  if not isinstance(error, CheckpointError | TrainingError | OSError | ValueError):
    return traceback.format_exc()
  logging.debug("Traceback:", exc_info=True)
  return f"{type(error).__name__}: {error}\n(--verbosity=1 shows the traceback.)"


def _end(status: int, message: str) -> NoReturn:
  """Ends the process; one of several does not wait for the others, which may wait for it."""
  if _COORDINATOR.value is None:
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)
  from train import multihost

  multihost.leave(status, message)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
