"""Writing a file whole or not at all."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
  """Yields the path of a new file beside `path`, which replaces `path` at the end.

  The folder is made. After an error `path` is as before, and the new file is deleted.

  Raises:
    OSError: the file could not be written; the message names `path`, where that of a write to a
      full disk has no name.
  """
  path = Path(path)
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    partial.replace(path)
  except OSError as error:
    if error.errno is None or error.filename not in (None, partial, str(partial)):
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error
  finally:
    partial.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
  """Checks that `whole_file` can write a file, before the long work whose result it gets.

  The folder is made. A disk that becomes full later is not foreseen.

  Raises:
    OSError: the path is a folder, or its folder cannot be made or written to.
  """
  path = Path(path)
  if path.is_dir():
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryFile(dir=path.parent):
    pass
