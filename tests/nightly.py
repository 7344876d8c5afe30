"""Parameters that the nightly tests add to those of every run."""

from collections.abc import Iterable
from typing import Any

import pytest


def nightly(*values: Any) -> list[Any]:
  """The values, a tuple for several arguments, as parameters with the marker `nightly`."""
  arguments = (value if isinstance(value, tuple) else (value,) for value in values)
  return [pytest.param(*each, marks=pytest.mark.nightly) for each in arguments]


def nightly_except(values: Iterable[Any], *kept: Any) -> list[Any]:
  """The values as parameters, all but `kept` with the marker `nightly`."""
  return [value if value in kept else nightly(value)[0] for value in values]
