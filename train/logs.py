"""Log lines that stand above the progress bar, and that libraries do not bury."""

import logging as std_logging
import sys

from absl import logging
from tqdm import tqdm


def set_up_logging() -> None:
  """Sends log lines past the progress bar, and of libraries' lines the warnings alone.

  Orbax logs dozens of lines for a checkpoint. When a save fails it raises the error, which is
  reported once, and also logs it for each array; its abandoned writes complain that their event
  loop is closed.
  """
  handler = logging.get_absl_handler()
  handler.addFilter(_is_ours_or_warning)
  handler.python_handler.setStream(_AboveTheBar())
  sys.unraisablehook = _unless_loop_is_closed


class _AboveTheBar:
  """A stream to standard error that redraws the progress bar below what it writes."""

  def write(self, text: str) -> None:
    tqdm.write(text, file=sys.stderr, end="")

  def flush(self) -> None:
    sys.stderr.flush()

  def close(self) -> None:  # absl closes its stream at the end, when errors are still to be shown.
    self.flush()


def _is_ours_or_warning(record: std_logging.LogRecord) -> bool:
  is_ours = "site-packages" not in record.pathname and record.name != "asyncio"
  return is_ours or record.levelno == std_logging.WARNING


def _unless_loop_is_closed(unraisable: "sys.UnraisableHookArgs") -> None:
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)
