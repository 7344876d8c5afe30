"""The files of a corpus, the documents in them, and the documents that are held out."""

import dataclasses
import glob
import gzip
import hashlib
import json
import lzma
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator
from typing import Literal, Self

from train.data.config import PYTHON_STDLIB
from train.data.conversations import is_conversation, to_document

Split = Literal["train", "validation"]

# Python's own tests repeat themselves, and topics.py is one long text that is no source code.
_STDLIB_LEFT_OUT = frozenset(
  {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
)

# Of documents of at least this many characters (some 14 thousand tokens) every 8th is held out, so
# that the loss at late positions rests on several documents; of the others every 16th.
_LONG_DOCUMENT = 50_000
_LONG_STEP, _SHORT_STEP = 8, 16


_BYTE_ORDER_MARK = "\ufeff"  # Some programs write it at the beginning of UTF-8 files.


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The files that a data set is made of.

  Attributes:
    train_files: files with training documents.
    validation_files: files with held-out documents; empty takes them from the training files.
  """

  train_files: tuple[pathlib.Path, ...]
  validation_files: tuple[pathlib.Path, ...]

  @classmethod
  def find(cls, train_patterns: tuple[str, ...], validation_patterns: tuple[str, ...]) -> Self:
    """The corpus that paths and glob patterns name.

    Raises:
      FileNotFoundError: a path or pattern that names no file.
      ValueError: a folder, or a file that is both for training and held out.
    """
    corpus = cls(find_files(train_patterns), find_files(validation_patterns))
    both = set(corpus.train_files) & set(corpus.validation_files)
    if both:
      raise ValueError(
        f"{min(both)} is named by train_files and by validation_files; it can be in one alone."
      )
    return corpus

  def fingerprint(self) -> str:
    """A hash of the files' contents, kinds and order, and of the rule that holds documents out."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{_LONG_DOCUMENT} {_LONG_STEP} {_SHORT_STEP}".encode())
    for files in (self.train_files, self.validation_files):
      digest.update(len(files).to_bytes(8))
      for path in files:
        with path.open("rb") as file:
          digest.update(hashlib.file_digest(file, "blake2b").digest())
        digest.update("".join(path.suffixes[-2:]).encode())
    return digest.hexdigest()

  def check_unchanged(self, fingerprint: str) -> None:
    """Raises ValueError unless the files still have a fingerprint that they had."""
    if self.fingerprint() != fingerprint:
      raise ValueError(
        "Files of config.data.train_files or config.data.validation_files changed while they were "
        "read. Start the same command again when no program writes to them."
      )

  def has_conversations(self) -> bool:
    """Whether the first line of one of the .jsonl files is a conversation."""
    return any(
      is_conversation(next(read_documents(path), ""))
      for path in (*self.train_files, *self.validation_files)
      if ".jsonl" in path.suffixes[-2:]
    )

  def documents(self, split: Split) -> Iterator[str]:
    """The documents of a split, in the order of the files."""
    if self.validation_files:
      files = self.train_files if split == "train" else self.validation_files
      for path in files:
        yield from read_documents(path)
      return
    long = short = 0
    for path in self.train_files:
      for document in read_documents(path):
        if len(document) >= _LONG_DOCUMENT:
          long += 1
          held_out = long % _LONG_STEP == 0
        else:
          short += 1
          held_out = short % _SHORT_STEP == 0
        if held_out == (split == "validation"):
          yield document


def find_files(patterns: tuple[str, ...]) -> tuple[pathlib.Path, ...]:
  """The files that paths and glob patterns name, each once, sorted within a pattern."""
  found: dict[pathlib.Path, None] = {}
  for pattern in patterns:
    matches = _stdlib_files() if pattern == PYTHON_STDLIB else _glob_files(pattern)
    found |= dict.fromkeys(path.resolve() for path in matches)
  return tuple(found)


def read_documents(path: pathlib.Path) -> Iterator[str]:
  """The documents of a file that are not blank.

  NUL characters separate the documents of a text file; in a .jsonl file each line is one, in its
  field "text", or a conversation in its field "messages" (`train.data.conversations`). Both may be
  compressed (.gz, .xz). A byte order mark at the beginning of a file is not part of a document.

  Raises:
    ValueError: a file that is damaged, not UTF-8, or no such JSON; it names the file and, of a
      .jsonl file, the line.
  """
  suffixes = path.suffixes
  text = _read_text(path)
  is_jsonl = ".jsonl" in suffixes[-2:]
  documents = _jsonl_texts(path, text) if is_jsonl else text.split("\0")
  return (document for document in documents if document.strip())


def _stdlib_files() -> list[pathlib.Path]:
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  files = sorted(
    path
    for path in root.rglob("*.py")
    if not _STDLIB_LEFT_OUT.intersection(path.relative_to(root).parts)
  )
  if not files:
    raise FileNotFoundError(
      f"{PYTHON_STDLIB!r}: this Python keeps no library source in {root}; name text files instead."
    )
  return files


def _glob_files(pattern: str) -> list[pathlib.Path]:
  # Path.glob takes no absolute pattern.
  matches = glob.glob(str(pathlib.Path(pattern).expanduser()), recursive=True)  # noqa: PTH207
  paths = [pathlib.Path(match) for match in matches]
  files = sorted(path for path in paths if path.is_file())
  if files:
    return files
  if any(path.is_dir() for path in paths):
    raise ValueError(f"{pattern} is a folder; name its files, such as {pattern}/**/*.txt.")
  raise FileNotFoundError(f"No file matches {pattern!r}; name an existing file or a glob pattern.")


def _read_text(path: pathlib.Path) -> str:
  try:
    match path.suffix:
      case ".gz":
        content = gzip.decompress(path.read_bytes())
      case ".xz":
        content = lzma.decompress(path.read_bytes())
      case _:
        content = path.read_bytes()
    return content.decode("utf-8").removeprefix(_BYTE_ORDER_MARK)
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path} is not UTF-8 text: {error.reason} at byte {error.start}. Convert the file or leave "
      "it out."
    ) from error
  except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error) as error:
    raise ValueError(f"{path} is damaged: {error}.") from error


_FIELD = {False: "text", True: "messages"}


def _jsonl_texts(path: pathlib.Path, lines: str) -> Iterator[str]:
  kind: bool | None = None
  for number, line in enumerate(lines.split("\n"), start=1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
      is_chat = "messages" in record
      text = record[_FIELD[is_chat]]
    except (KeyError, RecursionError, TypeError, ValueError) as error:
      raise ValueError(
        f'{path}, line {number}, is no JSON object with a field "text" or "messages": {error!r}.'
      ) from error
    if kind not in (None, is_chat):
      raise ValueError(
        f'{path}, line {number}: the lines before have the field "{_FIELD[not is_chat]}", this one '
        f'has "{_FIELD[is_chat]}". Put texts and conversations into files of their own.'
      )
    kind = is_chat
    if is_chat:
      try:
        text = to_document(text)
      except ValueError as error:
        raise ValueError(f"{path}, line {number}, is no conversation: {error}") from error
    elif isinstance(text, str) and is_conversation(text):
      raise ValueError(f'{path}, line {number}: the field "text" begins like a conversation.')
    if not isinstance(text, str):
      raise ValueError(f'{path}, line {number}: the field "text" holds no string but {text!r}.')
    try:
      text.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a pair: "\\ud83d".
      raise ValueError(
        f'{path}, line {number}: the field "text" holds the lone surrogate '
        f"\\u{ord(text[error.start]):04x} at character {error.start}, which is no text. Repair or "
        "remove the line."
      ) from error
    yield text
