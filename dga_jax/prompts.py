"""Prompts from the command line, from files and from standard input."""

import json
import sys
from pathlib import Path
from typing import Any

STDIN = "-"
"""The path that denotes standard input."""


def read_prompts(path: Path) -> list[str]:
  r"""The prompts of a UTF-8 file: one a line, lines end with \n or \r\n, blank lines are skipped.

  Other line separators of Unicode, such as U+2028, U+0085 and form feed, are part of a prompt. A
  byte order mark at the start of the file is not.

  Raises:
    OSError: the file cannot be read.
    ValueError: the file has no prompt, or bytes that are not UTF-8 (with the line's number).
  """
  texts = [text for _, text in _lines(path)]
  if not texts:
    raise ValueError(f"{path} has no prompt; write one prompt a line.")
  return texts


def read_json_lines(path: Path) -> list[dict[str, Any]]:
  """The records of a JSONL file, each with the text "prompt" or the list "messages".

  A record may have other keys, such as an id.

  Raises:
    OSError: the file cannot be read.
    ValueError: the file has no record, bytes that are not UTF-8, or a record of another form; the
      message has the line's number.
  """
  records = []
  for number, line in _lines(path):
    where = f"{path}, line {number}"
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{where} is not JSON: {error}.") from error
    if not isinstance(record, dict):
      raise ValueError(f"{where} is a {type(record).__name__}; it must be an object.")
    if ("prompt" in record) == ("messages" in record):
      raise ValueError(f'{where} must have one of the keys "prompt" and "messages".')
    if not isinstance(record.get("prompt", ""), str):
      raise ValueError(f'{where}: "prompt" must be a string.')
    if not isinstance(record.get("messages", []), list):
      raise ValueError(f'{where}: "messages" must be a list of objects with "role" and "content".')
    records.append(record)
  if not records:
    raise ValueError(f'{path} has no record; write one object a line, such as {{"prompt": "a"}}.')
  return records


def read_text(path: str) -> str:
  """A whole UTF-8 file, or standard input for "-", without the line end at its end.

  Raises:
    OSError: the file cannot be read.
    ValueError: it is empty, or has bytes that are not UTF-8.
  """
  content = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
  name = "standard input" if path == STDIN else path
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{name}: byte {error.object[error.start]:#04x} at position {error.start} is not UTF-8."
      " Convert it to UTF-8."
    ) from error
  if not text.strip():
    raise ValueError(f"{name} is empty; give a text.")
  return text.removesuffix("\n").removesuffix("\r")


def check_text(text: str, name: str) -> str:
  """Returns the text of a command-line argument.

  Args:
    text: as in `sys.argv`, where a byte that is not UTF-8 is a lone surrogate.
    name: of the argument, for the error.

  Raises:
    ValueError: the text has a byte that is not UTF-8.
  """
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    code = ord(text[error.start])
    what = f"byte {code - 0xDC00:#04x}" if 0xDC80 <= code <= 0xDCFF else f"surrogate U+{code:04X}"
    raise ValueError(
      f"{name} has the {what} at position {error.start}, which is not UTF-8 text. Give UTF-8."
    ) from error
  return text


def _lines(path: Path) -> list[tuple[int, str]]:
  """The lines of a file that are not blank, with their numbers from 1."""
  lines = []
  for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
    encoding = "utf-8-sig" if number == 1 else "utf-8"
    try:
      text = line.removesuffix(b"\r").decode(encoding)
    except UnicodeDecodeError as error:
      raise ValueError(
        f"{path}, line {number}: byte {error.object[error.start]:#04x} at position {error.start} is"
        " not UTF-8. Convert the file to UTF-8."
      ) from error
    if text.strip():
      lines.append((number, text))
  return lines
