"""The error of every reader of other programs' files."""

import contextlib
import reprlib
from collections.abc import Iterator
from pathlib import Path


class ConversionError(ValueError):
  """A file is damaged, or the decoder cannot compute its model. The message names the file."""


@contextlib.contextmanager
def conversion_errors(where: str | Path) -> Iterator[None]:
  """Turns errors of the wrapped code into ConversionError with `where` in front.

  ConversionError itself and OSError, which names its file, pass.
  """
  try:
    yield
  except (ConversionError, OSError):
    raise
  except Exception as error:
    raise ConversionError(f"{where}: {error}") from error


def shown(value: object) -> str:
  """The repr of a value from a file, cut to a few hundred characters."""
  return _REPR.repr(value)


_REPR = reprlib.Repr(
  maxlevel=3, maxdict=8, maxlist=8, maxtuple=8, maxset=8, maxstring=200, maxlong=60, maxother=200
)
