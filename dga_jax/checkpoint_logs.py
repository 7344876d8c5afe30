"""Without the checkpoint library's reports of an error that it also raises."""

import logging as std_logging
import sys

from absl import logging


def hide_save_errors() -> None:
  """Leaves a failed save to its exception, which the caller shows.

  Orbax raises the error and also logs it, with a traceback for each array. The writes that it
  abandons report that their event loop is closed.
  """
  logging.get_absl_handler().addFilter(_is_no_error_of_orbax)
  sys.unraisablehook = _unless_loop_is_closed


def _is_no_error_of_orbax(record: std_logging.LogRecord) -> bool:
  return record.levelno < std_logging.ERROR or "/orbax/" not in record.pathname


def _unless_loop_is_closed(unraisable: "sys.UnraisableHookArgs") -> None:
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)
