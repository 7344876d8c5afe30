"""A file of results as JSON lines, so that an interrupted run continues with missing results."""

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dga_jax.files.named_errors import name_file

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "dga-jax")


def environment() -> dict[str, Any]:
  """The versions of the packages and of Python, and the devices."""
  versions = {}
  for package in _PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # A checkout that is not installed.
      versions[package] = "checkout"
  device = jax.devices()[0]
  return {
    "versions": versions | {"python": platform.python_version()},
    "device": f"{jax.device_count()} × {device.device_kind} ({device.platform})",
  }


class Results:
  """A .jsonl file of results, one a line; a later line with the same key replaces an earlier one.

  Args:
    path: the file; `add` creates it and its folder.

  Raises:
    ValueError: a line other than the last is not a result.
  """

  def __init__(self, path: str | Path) -> None:
    self._path = Path(path)
    self._results: dict[str, dict[str, Any]] = {}
    if self._path.is_file():
      self._read()

  def __contains__(self, key: object) -> bool:
    return key in self._results

  def __getitem__(self, key: str) -> dict[str, Any]:
    return self._results[key]

  def all(self) -> list[dict[str, Any]]:
    """Every result, oldest first."""
    return list(self._results.values())

  def add(self, key: str, result: Mapping[str, Any]) -> None:
    """Appends a result; it is on disk when this returns, and after an error nothing of it is.

    Raises:
      OSError: the file could not be written.
      ValueError: the result has a number that is NaN or infinite.
    """
    added = {"key": key, **result}
    line = (json.dumps(added, allow_nan=False) + "\n").encode()
    self._path.parent.mkdir(parents=True, exist_ok=True)
    size = self._path.stat().st_size if self._path.exists() else None
    try:
      with name_file(self._path), self._path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    except OSError:
      self._restore(size)
      raise
    self._results[key] = added

  def _restore(self, size: int | None) -> None:
    """Gives the file the size that it had, None for no file."""
    with contextlib.suppress(OSError):  # The caller raises the error of writing.
      if size is None:
        self._path.unlink(missing_ok=True)
      else:
        os.truncate(self._path, size)

  def _read(self) -> None:
    *lines, rest = self._path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
      if not self._take(line):
        raise ValueError(
          f"{self._path}, line {number}, is not a result. Delete the line; its job runs again."
        )
    if not rest:
      return
    with self._path.open("r+b") as file:
      if self._take(rest):
        file.seek(0, os.SEEK_END)
        file.write(b"\n")
      else:  # The process was killed while it wrote this line: the job runs again.
        file.truncate(sum(len(line) + 1 for line in lines))

  def _take(self, line: bytes) -> bool:
    """Adds the result in a line; False if there is none."""
    try:
      result = json.loads(line)
      self._results[result["key"]] = result
    except (ValueError, KeyError, TypeError):
      return False
    return True
