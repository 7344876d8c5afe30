"""Folders of prepared data: built once, whole or not at all, and compared with their hashes."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from absl import logging

from dga_jax.files.hashes import FileRecord, find_file_damage, hash_files
from dga_jax.files.lock import hold_lock

_FILE_NAME = "files.json"


def prepare(folder: Path, build: Callable[[Path], None], *, repair: bool = False) -> None:
  """Builds a folder unless it is there already; then compares its files with their hashes.

  The files are built in a temporary folder beside it, which gets its name when all of them are
  written. Of several processes that prepare the same folder one builds and the others wait. What a
  killed process has left is deleted.

  Args:
    folder: a path that changes whenever the content would.
    build: writes the files into the folder that it is given.
    repair: build a damaged folder anew.

  Raises:
    OSError: the folder is damaged, or could not be written.
  """
  if _is_whole(folder, repair=repair):
    return
  partial = folder.with_name(f"{folder.name}.partial")
  with hold_lock(folder.with_name(f"{folder.name}.lock"), wait=True):
    shutil.rmtree(partial, ignore_errors=True)
    if _is_whole(folder, repair=repair):
      return
    shutil.rmtree(folder, ignore_errors=True)
    try:
      partial.mkdir(parents=True)
      build(partial)
      paths = [path for path in partial.rglob("*") if path.is_file()]
      records = hash_files(partial, [path.relative_to(partial).as_posix() for path in paths])
      values = {name: dataclasses.asdict(record) for name, record in records.items()}
      (partial / _FILE_NAME).write_text(json.dumps(values), encoding="utf-8")
      partial.rename(folder)
    finally:
      shutil.rmtree(partial, ignore_errors=True)


def _is_whole(folder: Path, *, repair: bool) -> bool:
  """Whether a prepared folder is there; OSError if it is damaged and not to be repaired."""
  damage = _find_damage(folder) if folder.exists() else None
  if damage is None:
    return folder.exists()
  message = f"The prepared data in {folder} are damaged: {damage}"
  if not repair:
    raise OSError(f"{message} Give --repair_data to prepare them anew from the text files.")
  logging.warning("%s They are prepared anew.", message)
  return False


def _find_damage(folder: Path) -> str | None:
  try:
    values = json.loads((folder / _FILE_NAME).read_bytes())
    records = {name: FileRecord(**record) for name, record in values.items()}
  except (AttributeError, OSError, RecursionError, TypeError, ValueError) as error:
    return f"{_FILE_NAME} is unreadable: {error}."
  return find_file_damage(folder, records)
