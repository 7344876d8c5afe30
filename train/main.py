r"""Trains a decoder.

  python -m train.main --config=configs/quickstart.py --workdir=runs/quickstart \
    --config.learning_rate=1e-3

The same command again goes on where the run stopped.
"""

import re
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from dga_jax.checkpoint import CheckpointError
from train.config import check_key, make_config
from train.errors import TrainingError
from train.logs import set_up_logging
from train.loop import train

_CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="Config file; --config.KEY=VALUE changes a key.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run: checkpoints, metrics, plots.", required=True
)
flags.mark_flag_as_required("config")

_OVERRIDE = re.compile(r"--?config\.([\w.]+)")


def main(argv: list[str]) -> None:
  """Trains by the flags."""
  del argv
  set_up_logging()
  try:
    train(make_config(_CONFIG.value), Path(_WORKDIR.value))
  except (CheckpointError, TrainingError, OSError, ValueError) as error:
    # What a user can mend: the message says how, and a traceback would hide it.
    logging.debug("Traceback:", exc_info=True)
    sys.exit(f"{type(error).__name__}: {error}\n(--verbosity=1 shows the traceback.)")


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; says of a --config.KEY that cannot be set why it cannot."""
  overrides = [match[1] for argument in argv if (match := _OVERRIDE.match(argument))]
  try:
    for key in overrides:
      check_key(key)
    return app.parse_flags_with_usage(argv)
  except ValueError as error:
    sys.exit(f"{error}")
  except (AttributeError, KeyError) as error:
    sys.exit(
      f"{error}: the config file does not set this key, so it cannot be changed. Start the file "
      "from configs.base, which sets every key."
    )


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
