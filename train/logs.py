"""Log lines above the progress bar, without the routine messages of libraries."""

import logging as std_logging
import sys

from absl import logging
from tqdm import tqdm

from dga_jax.checkpoint_logs import hide_save_errors


def set_up_logging() -> None:
  """Shows log lines above the progress bar, and of the libraries' lines the warnings alone.

  Orbax logs dozens of lines for a checkpoint.
  """
  hide_save_errors()
  handler = logging.get_absl_handler()
  handler.addFilter(_is_ours_or_warning)
  handler.python_handler.setStream(_AboveTheBar())


class _AboveTheBar:
  """A stream to standard error that redraws the progress bar below what it writes."""

  def write(self, text: str) -> None:
    tqdm.write(text, file=sys.stderr, end="")

  def flush(self) -> None:
    sys.stderr.flush()

  def close(self) -> None:  # absl closes its stream at exit, before the last errors are shown.
    self.flush()


def _is_ours_or_warning(record: std_logging.LogRecord) -> bool:
  is_ours = "site-packages" not in record.pathname and record.name != "asyncio"
  return is_ours or record.levelno == std_logging.WARNING
