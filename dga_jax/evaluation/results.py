"""Results as JSON lines: a run that was cut off goes on with the cells that it lacks."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "dga-jax")


def environment() -> dict[str, Any]:
  """Versions, and the devices that computed."""
  versions = {}
  for package in _PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout, not installed
      versions[package] = "checkout"
  device = jax.devices()[0]
  return {
    "versions": versions | {"python": platform.python_version()},
    "device": f"{jax.device_count()} × {device.device_kind} ({device.platform})",
  }


class Results:
  """A .jsonl file of cells, one line each; a later line with the same key replaces an earlier.

  Args:
    path: the file; made with its folder at the first `add`.

  Raises:
    ValueError: a line other than the last is no record.
  """

  def __init__(self, path: str | Path) -> None:
    self._path = Path(path)
    self._cells: dict[str, dict[str, Any]] = {}
    if self._path.is_file():
      self._read()

  def __contains__(self, key: object) -> bool:
    return key in self._cells

  def __getitem__(self, key: str) -> dict[str, Any]:
    return self._cells[key]

  def all(self) -> list[dict[str, Any]]:
    """Every record, oldest first."""
    return list(self._cells.values())

  def add(self, key: str, record: Mapping[str, Any]) -> None:
    """Appends a cell; it is on disk when this returns."""
    self._cells[key] = {"key": key, **record}
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with self._path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(self._cells[key]) + "\n")
      file.flush()
      os.fsync(file.fileno())

  def _read(self) -> None:
    lines = self._path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
      try:
        record = json.loads(line)
        self._cells[record["key"]] = record
      except (json.JSONDecodeError, KeyError, TypeError) as error:
        if number < len(lines):
          raise ValueError(f"{self._path}, line {number}, is no record.") from error
        # The process was killed while it wrote this line: the cell is done again.
        whole = "".join(f"{line}\n" for line in lines[:-1])
        self._path.write_text(whole, encoding="utf-8")
