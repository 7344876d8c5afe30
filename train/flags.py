"""Flags of the commands that read a config file."""

import re
import sys

from absl import app

from train.config import check_key

_OVERRIDE = re.compile(r"--?config\.([\w.]+)")


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
