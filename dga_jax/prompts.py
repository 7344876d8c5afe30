"""Prompts from the command line and from files."""

from pathlib import Path


def read_prompts(path: Path) -> list[str]:
  r"""The prompts of a UTF-8 file: one a line, lines end with \n or \r\n, blank lines are skipped.

  Other line separators of Unicode, such as U+2028, U+0085 and form feed, are part of a prompt. A
  byte order mark at the start of the file is not.

  Raises:
    OSError: the file cannot be read.
    ValueError: the file has no prompt, or bytes that are not UTF-8 (with the line's number).
  """
  texts = []
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
      texts.append(text)
  if not texts:
    raise ValueError(f"{path} has no prompt; write one prompt a line.")
  return texts


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
