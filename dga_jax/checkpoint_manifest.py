"""The manifest of a checkpoint: its step, and the size and BLAKE2b hash of each of its files.

A reader accepts an item of a checkpoint only if the manifest names the step of the folder, and
every file of the item has the size and the hash of the manifest. So a renamed step folder, items
exchanged between checkpoints, an edited position and any flipped bit are all detected, before a
parser sees the file.

The hashes are of files, so they do not depend on the number of processes or on the mesh that
reads. When a run of several processes saves, each process hashes the array files that it wrote;
process 0 hashes the rest and writes the manifest. All of this happens in the background thread of
the save, before the checkpoint gets its final name.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from dga_jax.files.hashes import FileRecord, find_file_damage, hash_files
from dga_jax.files.paths import is_gcs
from dga_jax.files.storage import AnyPath, files_below, to_path

# Orbax finalizes items in alphabetical order, and this one has to be the last.
ITEM = "verification"
FILE_NAME = "manifest.json"
_FORMAT = 1
# Errors that JSON of unexpected content leads to.
_UNREADABLE = (
  ArithmeticError,
  AttributeError,
  LookupError,
  RecursionError,
  TypeError,
  ValueError,
)
# Suffix of an item's folder until orbax finalizes the item. An object store cannot rename folders:
# there the folder has its final name from the start, and orbax finalizes it with a file.
TEMPORARY = ".orbax-checkpoint-tmp"
_FINALIZED_FILE = "commit_success.txt"


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a checkpoint has to be.

  Attributes:
    step: of the training run.
    eval_loss: held-out loss at that step in nats per token, None where it was not evaluated.
    files: a record of each file by its path in the checkpoint, such as "config/metadata".
  """

  step: int
  eval_loss: float | None
  files: Mapping[str, FileRecord]

  def to_json(self) -> str:
    """The manifest with a hash of itself."""
    values = dataclasses.asdict(self)
    return json.dumps({"format": _FORMAT, "blake2b": _hash_json(values), "manifest": values})

  @classmethod
  def read(cls, folder: AnyPath) -> Self:
    """Reads the manifest of a checkpoint.

    Raises:
      FileNotFoundError: it has none.
      ValueError: the manifest is damaged, or of a later version of this project.
    """
    content = (folder / ITEM / FILE_NAME).read_bytes()
    try:
      values = json.loads(content)
      if not isinstance(values["format"], int) or values["format"] > _FORMAT:
        raise ValueError(f"its format is {values['format']!r}; this version reads {_FORMAT}.")
      manifest = values["manifest"]
      if values["blake2b"] != _hash_json(manifest):
        raise ValueError("its hash does not fit its content.")
      files = {_inner_path(name): FileRecord(**file) for name, file in manifest["files"].items()}
      eval_loss = manifest["eval_loss"]
      return cls(int(manifest["step"]), None if eval_loss is None else float(eval_loss), files)
    except _UNREADABLE as error:
      raise ValueError(f"{ITEM}/{FILE_NAME} is unreadable: {error!r}") from error

  def find_damage(
    self,
    folder: AnyPath,
    items: Collection[str] | None = None,
    *,
    share: tuple[int, int] = (0, 1),
  ) -> str | None:
    """Compares files with the manifest.

    Args:
      folder: of the checkpoint.
      items: names of the items to compare; None compares all.
      share: (index, count) compares only every count-th file, so that `count` processes divide
        the work.

    Returns:
      A sentence that names the first file that differs, or None.
    """
    if not folder.name.isdecimal() or int(folder.name) != self.step:
      return f"its manifest is of step {self.step}."
    names = sorted(name for name in self.files if items is None or _item(name) in items)
    missing = set() if items is None else set(items) - {_item(name) for name in names}
    if missing:
      return f"its manifest lacks the item '{min(missing)}'."
    index, count = share
    return find_file_damage(folder, {name: self.files[name] for name in names[index::count]})


@dataclasses.dataclass
class SaveManifest(ocp.args.CheckpointArgs):
  """Orbax's argument that saves the manifest; see `Manifest` for the attributes."""

  step: int
  eval_loss: float | None


class ManifestHandler(ocp.AsyncCheckpointHandler):
  """Orbax's handler of the manifest."""

  def __init__(self) -> None:
    self._args: SaveManifest | None = None

  async def async_save(self, directory: AnyPath, args: SaveManifest) -> list[ocp.future.Future]:
    """Returns what the background thread waits for after the other items are written."""
    self._args = args
    return [_OwnArrayFiles(to_path(directory))]

  def save(self, directory: AnyPath, args: SaveManifest) -> None:
    """Saves in this thread."""
    self._args = args
    _OwnArrayFiles(to_path(directory)).result()

  def restore(self, directory: AnyPath, args: ocp.args.CheckpointArgs | None = None) -> Manifest:
    """Reads the manifest."""
    del args
    return Manifest.read(to_path(directory).parent)

  def finalize(self, directory: AnyPath) -> None:
    """Writes the manifest; called by process 0 alone, after all processes have written."""
    assert self._args is not None
    directory = to_path(directory)
    folder = directory.parent
    unfinished = [
      path.name for path in _items(folder) if path != directory and not _is_finalized(path)
    ]
    if unfinished:
      raise RuntimeError(f"orbax has not finalized {unfinished} before the item '{ITEM}'.")
    files: dict[str, FileRecord] = {}
    for path in _part_paths(directory):
      files |= {name: FileRecord(**file) for name, file in json.loads(path.read_text()).items()}
      path.unlink()
    paths = [path for item in _items(folder) for path in files_below(item)]
    names = [path.relative_to(folder).as_posix() for path in paths]
    files |= hash_files(folder, [name for name in names if name not in files])
    manifest = Manifest(self._args.step, self._args.eval_loss, files)
    (directory / FILE_NAME).write_text(manifest.to_json())


ocp.args.register_with_handler(ManifestHandler, for_save=True, for_restore=True)(SaveManifest)


class _OwnArrayFiles(ocp.future.Future):
  """Hashes the array files that this process has written, in a run of several processes.

  Orbax waits for the futures of all items in order, and for this one last: then the other items
  of this process are on the disk.
  """

  def __init__(self, directory: AnyPath) -> None:
    self._directory = directory

  def result(self, timeout: float | None = None) -> None:
    del timeout
    if jax.process_count() == 1:
      return
    folder, process = self._directory.parent, jax.process_index()
    own = [item / f"ocdbt.process_{process}" for item in _items(folder)]
    names = [
      path.relative_to(folder).as_posix()
      for part in own
      if part.is_dir()
      for path in files_below(part)
    ]
    records = {
      name.replace(TEMPORARY, "", 1): dataclasses.asdict(record)
      for name, record in hash_files(folder, names).items()
    }
    _part_paths(self._directory)[process].write_text(json.dumps(records))


def _part_paths(directory: AnyPath) -> list[AnyPath]:
  """Files in which processes record their array files; a single process needs none.

  A file is opened by its name: a listing of a shared folder may be some seconds old.
  """
  count = jax.process_count()
  return [directory / f"process_{index}.json" for index in range(count)] if count > 1 else []


def _items(folder: AnyPath) -> list[AnyPath]:
  """The folders of the items in the folder of a checkpoint."""
  return [path for path in folder.iterdir() if path.is_dir()]


def _is_finalized(item: AnyPath) -> bool:
  if is_gcs(item):
    return (item / _FINALIZED_FILE).exists()
  return not item.name.endswith(TEMPORARY)


def _hash_json(values: Any) -> str:
  text = json.dumps(values, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _item(name: str) -> str:
  return name.partition("/")[0]


def _inner_path(name: str) -> str:
  """Returns `name`; ValueError unless it is a path of a file inside an item's folder."""
  path = PurePosixPath(name)
  if path.is_absolute() or ".." in path.parts or len(path.parts) < 2:
    raise ValueError(f"{name!r} is not the path of a file in a checkpoint.")
  return name
