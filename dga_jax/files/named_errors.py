"""The file in an error of the operating system."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def name_file(path: str | os.PathLike[str]) -> Iterator[None]:
  """Adds a path to an OSError that names no file, such as a full disk's."""
  try:
    yield
  except OSError as error:
    error.filename = error.filename or os.fspath(path)
    raise
