"""JSON and text files of other programs, with bounds on what they may hold."""

import json
from pathlib import Path
from typing import Any

from dga_jax.conversion.errors import ConversionError

# Bytes. An index of a hundred layers has 100 kB, the largest tokenizer.json some 35 MB.
MAX_JSON_BYTES = 8 << 20
MAX_TOKENIZER_BYTES = 64 << 20


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
  """A UTF-8 file.

  Raises:
    FileNotFoundError: there is no such file.
    ConversionError: it is larger than `max_bytes`, not UTF-8, or a Git LFS pointer.
  """
  if not path.is_file():
    raise FileNotFoundError(f"There is no {path}.")
  with path.open("rb") as stream:
    content = stream.read(max_bytes + 1)
  if len(content) > max_bytes:
    raise ConversionError(f"{path} is damaged: it has more than {max_bytes} bytes.")
  check_not_lfs_pointer(path, content)
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ConversionError(f"{path} is damaged: it is not UTF-8 ({error}).") from error


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
  """A JSON file that holds an object.

  Raises:
    FileNotFoundError: there is no such file.
    ConversionError: as for `read_text`, or it is not a JSON object, an object in it has a key
      twice, or a number is NaN or infinite.
  """
  return parse_json(read_text(path, max_bytes), path)


def parse_json(text: str, path: Path) -> dict[str, Any]:
  """The object in the text of a JSON file; errors as for `read_json`."""
  try:
    values = json.loads(
      text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite
    )
  except (ValueError, RecursionError) as error:
    raise ConversionError(f"{path} is damaged: {error}.") from error
  if not isinstance(values, dict):
    raise ConversionError(f"{path} holds a {type(values).__name__}; it must be an object.")
  return values


def check_not_lfs_pointer(path: Path, head: bytes) -> None:
  """Raises ConversionError if the file that begins with `head` is a Git LFS pointer."""
  if head.startswith(b"version ") and b"git-lfs" in head[:100] and b"\noid sha256:" in head[:200]:
    raise ConversionError(
      f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository, or "
      "download the file."
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) < len(pairs):
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    raise ValueError(f"an object has the key {twice[:200]!r} twice")
  return values


def _no_constant(name: str) -> None:
  raise ValueError(f"it holds the number {name}")


def _finite(text: str) -> float:
  value = float(text)
  if value in (float("inf"), float("-inf")):
    raise ValueError(f"it holds the number {text[:60]}, which is too large")
  return value
