"""Files and folders of the file system and of Google Cloud Storage, behind one interface."""

import os
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from dga_jax.files.paths import is_gcs

# `epath.Path` has the methods of `pathlib.Path` for addresses gs://BUCKET/...
type AnyPath = Path | epath.Path


def to_path(path: str | os.PathLike[str]) -> AnyPath:
  """An `epath.Path` of an address gs://BUCKET/..., else a `Path`."""
  return epath.Path(path) if is_gcs(path) else Path(path)


def files_below(folder: AnyPath) -> Iterator[AnyPath]:
  """The files in a folder and its subfolders, in no particular order."""
  for path in folder.iterdir():
    if path.is_dir():
      yield from files_below(path)
    else:
      yield path
