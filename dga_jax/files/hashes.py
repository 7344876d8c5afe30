"""Size and BLAKE2b hash of files, to find any change of them."""

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Self

from dga_jax.files.storage import AnyPath

# hashlib releases Python's lock, so threads hash in parallel.
_THREADS = 8


@dataclasses.dataclass(frozen=True)
class FileRecord:
  """Attributes: bytes of a file, and its BLAKE2b hash of 32 bytes in hexadecimal."""

  size: int
  blake2b: str

  @classmethod
  def from_file(cls, path: AnyPath) -> Self:
    """Reads and hashes a file."""
    with path.open("rb") as file:
      digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32))
      return cls(file.tell(), digest.hexdigest())


def hash_files(folder: AnyPath, names: Iterable[str]) -> dict[str, FileRecord]:
  """Records of files by their path in a folder."""
  names = list(names)
  records = _map(lambda name: FileRecord.from_file(folder / name), names)
  return dict(zip(names, records, strict=True))


def find_file_damage(folder: AnyPath, records: Mapping[str, FileRecord]) -> str | None:
  """Compares files with their records.

  Returns:
    A sentence that names the first file that is missing or differs, or None.
  """
  damage = _map(lambda item: _compare(folder, *item), records.items())
  return next((sentence for sentence in damage if sentence is not None), None)


def _compare(folder: AnyPath, name: str, wanted: FileRecord) -> str | None:
  try:
    found = FileRecord.from_file(folder / name)
  except OSError as error:
    return f"{name} cannot be read: {error.strerror or error}."
  if found.size != wanted.size:
    return f"{name} has {found.size} bytes in place of {wanted.size}."
  if found != wanted:
    return f"{name} does not have the hash that it was written with."
  return None


def _map[S, T](function: Callable[[S], T], values: Iterable[S]) -> list[T]:
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    return list(threads.map(function, values))
