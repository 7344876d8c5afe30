r"""Trains a decoder.

  python -m train.main --config=configs/quickstart.py --workdir=runs/quickstart \
    --config.learning_rate=1e-3

The same command again goes on where the run stopped.

A run of several processes, here two on one machine, is the same command in each of them:

  python -m train.main --config=configs/quickstart.py --workdir=runs/quickstart \
    --coordinator=127.0.0.1:8476 --num_processes=2 --process_id=0  # and 1
"""

import sys
import traceback
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

from dga_jax.checkpoint import CheckpointError
from train import multihost
from train.config import make_config
from train.errors import TrainingError
from train.flags import define_config_flag, parse_flags
from train.logs import set_up_logging
from train.profile import ProfiledSteps
from train.setup import train

_CONFIG = define_config_flag()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run: checkpoints, metrics, plots.", required=True
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "HOST:PORT of process 0, for a run of several processes; 'auto' on a TPU pod, under Slurm and "
  "Open MPI, which tell the processes of each other.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_PROFILE = flags.DEFINE_string("profile", None, "N:M takes a profile of the steps N to M.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
  """Trains by the flags."""
  del argv
  set_up_logging()
  try:
    profiled = None if _PROFILE.value is None else ProfiledSteps.parse(_PROFILE.value)
    config = make_config(_CONFIG.value)
    multihost.start(
      multihost.ProcessFlags(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    )
    train(config, Path(_WORKDIR.value), profiled=profiled)
  except (CheckpointError, TrainingError, OSError, ValueError) as error:
    # What a user can mend: the message says how, and a traceback would hide it.
    logging.debug("Traceback:", exc_info=True)
    _fail(f"{type(error).__name__}: {error}\n(--verbosity=1 shows the traceback.)")
  except Exception:
    _fail(traceback.format_exc())


def _fail(message: str) -> NoReturn:
  """Ends the process; one of several does not wait for the others, which may wait for it."""
  if _COORDINATOR.value is None:
    sys.exit(message)
  multihost.leave(1, message)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
