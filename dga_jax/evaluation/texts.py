"""Documents from files, and rows of tokens from documents."""

import bz2
import contextlib
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, IO, NamedTuple

import numpy as np
from jaxtyping import Int

from dga_jax.tokenizer import Tokenizer

_OPEN: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


class Document(NamedTuple):
  """A text and its id."""

  id: str
  text: str


def read_documents(paths: Sequence[str | Path]) -> list[Document]:
  """The documents of files.

  Args:
    paths: .jsonl files with the fields `id` and `text` on every line, which may be compressed
      (.xz, .gz, .bz2), or text files of one document each, whose id is the path.

  Raises:
    OSError: a file cannot be read.
    ValueError: a file or line is not a document (the error names both), or there is no document.
  """
  documents = [document for path in paths for document in _read(Path(path))]
  if not documents:
    raise ValueError(f"documents is {list(map(str, paths))}; these files have no document.")
  return documents


def _read(path: Path) -> Iterator[Document]:
  if ".jsonl" not in path.suffixes:
    with _open(path) as file:
      yield Document(str(path), _decode(path, file.read()))
    return
  for number, values in read_jsonl(path):
    if not isinstance(values, dict) or not {"id", "text"} <= values.keys():
      raise ValueError(f"{path}, line {number}, lacks 'id' or 'text'.")
    if not isinstance(values["text"], str):
      raise ValueError(f"{path}, line {number}: 'text' is {values['text']!r}; it must be a string.")
    yield Document(str(values["id"]), values["text"])


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
  r"""The values of a .jsonl file, which may be compressed, each with its line number from 1 on.

  Lines end with \n; blank lines are skipped.

  Raises:
    OSError: the file cannot be read.
    ValueError: a line is not UTF-8 or not JSON, or its text has a lone surrogate, which is not a
      character.
  """
  with _open(path) as file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      try:
        values = json.loads(line)
        json.dumps(values, ensure_ascii=False).encode()
      except UnicodeEncodeError as error:
        raise ValueError(
          f"{path}, line {number}: the text has the lone surrogate"
          f" U+{ord(error.object[error.start]):04X}, which is not a character. Remove it."
        ) from error
      except RecursionError as error:
        raise ValueError(f"{path}, line {number}, is nested too deeply.") from error
      except ValueError as error:
        raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
      yield number, values


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
  """Opens a file to read bytes; its suffix names its compression.

  Raises:
    ValueError: the compressed data are damaged.
  """
  with _OPEN.get(path.suffix, open)(path, "rb") as file:
    try:
      yield file
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
      if isinstance(error, OSError) and error.errno is not None:
        raise
      raise ValueError(f"{path} is damaged: {error}") from error


def _decode(path: Path, content: bytes) -> str:
  try:
    return content.decode("utf-8").removeprefix("\ufeff")  # A byte order mark is not text.
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    byte = content[error.start]
    raise ValueError(f"{path}, line {line}: byte {byte:#04x} is not UTF-8.") from error


def token_rows(
  documents: Sequence[Document], tokenizer: Tokenizer, length: int, rows_per_document: int = 1
) -> Int[np.ndarray, "B T"]:
  """Rows of `length` inputs and their next tokens: int32 [B, length + 1].

  Each row starts with the tokens that start a document, followed by a piece of a document. The
  pieces of a document do not overlap, and start at its beginning.

  Args:
    documents: a document that is too short for a row is skipped.
    tokenizer: of the model.
    length: inputs of a row.
    rows_per_document: largest number of rows from one document.

  Raises:
    ValueError: no document has enough tokens for a row, or length leaves no room for a document.
  """
  start = list(tokenizer.start_ids)
  piece = length + 1 - len(start)
  if length < 1 or piece < 1:
    raise ValueError(
      f"length is {length}; it must be at least {max(1, len(start))}, for the tokens that start a "
      "document and one of its own."
    )
  rows = []
  for tokens in tokenizer.encode_batch([document.text for document in documents]):
    whole = min(rows_per_document, len(tokens) // piece)
    rows += [start + tokens[row * piece : (row + 1) * piece] for row in range(whole)]
  if not rows:
    raise ValueError(
      f"length is {length}; no document has that many tokens. Give longer documents."
    )
  return np.array(rows, np.int32)
