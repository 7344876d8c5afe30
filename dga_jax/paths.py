"""Checks of paths: an address such as gs://bucket/folder is not a path of the file system.

`pathlib` reads gs://bucket as the local folder "gs:" with the subfolder "bucket". A command that
writes there would report success and put the files on the wrong disk. Commands and configs check
their paths before they create anything.
"""

import os
import re

# A scheme has at least two characters, so that a drive letter is not a scheme.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def is_address(path: str | os.PathLike[str]) -> bool:
  """Whether a path begins with a scheme, as in gs://bucket, s3://bucket or file:///folder."""
  return _ADDRESS.match(os.fspath(path)) is not None


def check_path(name: str, path: str | os.PathLike[str]) -> None:
  """Refuses addresses of object stores.

  Args:
    name: the flag or config key that has the path.
    path: its value.

  Raises:
    ValueError: the path is an address; the message is one line.
  """
  match = _ADDRESS.match(os.fspath(path))
  if match:
    raise ValueError(
      f"{name} is {os.fspath(path)!r}; {match[1]}:// is not supported here. Give a path of the "
      "file system, for example a folder on a disk that all hosts mount."
    )
