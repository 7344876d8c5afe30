"""Checks of paths: local paths, and addresses gs://BUCKET/FOLDER of Google Cloud Storage.

`pathlib` reads gs://bucket as the local folder "gs:" with the subfolder "bucket". A command that
writes there would report success and put the files on the wrong disk. Commands and configs check
their paths before they create anything. `dga_jax.files.storage` opens the addresses.
"""

import importlib.util
import os
import re

# A scheme has at least two characters, so that a drive letter is not a scheme.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_GCS = re.compile(r"gs://[^/]+")


def is_gcs(path: str | os.PathLike[str]) -> bool:
  """Whether a path is an address gs://BUCKET/... of Google Cloud Storage."""
  return _GCS.match(os.fspath(path)) is not None


def check_path(name: str, path: str | os.PathLike[str], *, allow_gcs: bool = False) -> None:
  """Refuses addresses of object stores.

  Args:
    name: the flag or config key that has the path.
    path: its value.
    allow_gcs: accept addresses gs://BUCKET/...

  Raises:
    ValueError: the path is an address that is not supported here, or the package for gs:// is
      missing; the message is one line.
  """
  text = os.fspath(path)
  match = _ADDRESS.match(text)
  if not match:
    return
  if not (allow_gcs and is_gcs(text)):
    others = " or an address gs://BUCKET/FOLDER" if allow_gcs else ""
    raise ValueError(
      f"{name} is {text!r}; {match[1]}:// is not supported here. Give a path of the file system"
      f"{others}, for example a folder on a disk that all hosts mount."
    )
  if not _gcsfs_is_installed():
    raise ValueError(f'{name} is {text!r}; gs:// needs gcsfs: pip install "dga-jax[gcs]"')


def _gcsfs_is_installed() -> bool:
  return importlib.util.find_spec("gcsfs") is not None
