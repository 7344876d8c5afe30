"""The trainer's own errors, and the file in an error of the operating system."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class TrainingError(RuntimeError):
  """A run cannot continue; its checkpoints are intact."""


class DivergenceError(TrainingError):
  """Training diverged; every process of the run raises it at the same step."""


@contextlib.contextmanager
def name_file(path: Path | str) -> Iterator[None]:
  """Adds a path to an OSError that names no file, such as a full disk's."""
  try:
    yield
  except OSError as error:
    error.filename = error.filename or str(path)
    raise
