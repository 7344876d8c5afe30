"""Documents from files, and token rows made of them."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dga_jax.tokenizer import Tokenizer

_OPEN: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


class Document(NamedTuple):
  """One text and its name."""

  id: str
  text: str


def read_documents(paths: Sequence[str | Path]) -> list[Document]:
  """The documents of files.

  Args:
    paths: .jsonl files with the fields `id` and `text` on every line, compressed or not (.xz,
      .gz, .bz2), or text files of one document each, named by their path.

  Raises:
    OSError: a file that cannot be read.
    ValueError: a line that lacks a field, or no document at all.
  """
  documents = [document for path in paths for document in _read(Path(path))]
  if not documents:
    raise ValueError(f"documents is {list(map(str, paths))}, which hold no document.")
  return documents


def _read(path: Path) -> Iterator[Document]:
  if ".jsonl" not in path.suffixes:
    with open_text(path) as file:
      yield Document(str(path), file.read())
    return
  for number, values in read_jsonl(path):
    try:
      yield Document(str(values["id"]), values["text"])
    except (KeyError, TypeError) as error:
      raise ValueError(f"{path}, line {number}, lacks 'id' or 'text'.") from error


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
  """The values of a .jsonl file, compressed or not, each with its line number from 1 on.

  Raises:
    ValueError: a line that is no JSON.
  """
  with open_text(path) as file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      try:
        yield number, json.loads(line)
      except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}, is no JSON: {error}") from error


def open_text(path: Path) -> Any:
  """The file, opened to read UTF-8 text; its name says whether it is compressed."""
  return _OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8")


def token_rows(
  documents: Sequence[Document], tokenizer: Tokenizer, length: int, rows_per_document: int = 1
) -> Int[np.ndarray, "B L+1"]:
  """Rows of `length` inputs and their next tokens.

  Each row begins like a document and goes on with a piece of one: the first piece, then the next
  that does not overlap. A document gives as many whole rows as it has tokens for, up to
  `rows_per_document`.

  Raises:
    ValueError: no document has enough tokens for a row.
  """
  start = list(tokenizer.start_ids)
  piece = length + 1 - len(start)
  rows = []
  for tokens in tokenizer.encode_batch([document.text for document in documents]):
    whole = min(rows_per_document, len(tokens) // piece)
    rows += [start + tokens[row * piece : (row + 1) * piece] for row in range(whole)]
  if not rows:
    raise ValueError(f"length is {length}; no document has so many tokens.")
  return np.array(rows, np.int32)
