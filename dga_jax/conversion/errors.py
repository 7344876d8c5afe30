"""The error of every reader of other programs' files."""

import contextlib
import reprlib
from collections.abc import Iterator
from pathlib import Path

from dga_jax.tokenizer import is_panic


class ConversionError(ValueError):
  """A file is damaged, or the decoder cannot compute its model. The message names the file."""


@contextlib.contextmanager
def conversion_errors(where: str | Path) -> Iterator[None]:
  """Turns errors of the wrapped code, Rust panics included, into ConversionError.

  The message begins with `where`. ConversionError itself and OSError, which names its file, pass.
  """
  try:
    yield
  except (ConversionError, OSError):
    raise
  except BaseException as error:
    if not (isinstance(error, Exception) or is_panic(error)):
      raise
    raise ConversionError(f"{where}: {error}") from error


def shown(value: object) -> str:
  """The repr of a value from a file, in one line of a few hundred characters."""
  return " ".join(_REPR.repr(value).split())


_REPR = reprlib.Repr(
  maxlevel=3, maxdict=8, maxlist=8, maxtuple=8, maxset=8, maxstring=200, maxlong=60, maxother=200
)
