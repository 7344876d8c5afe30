"""Parameters that the nightly tests add to those of every run."""

from collections.abc import Iterable
from typing import Any

import pytest


def nightly(*values: Any) -> list[Any]:
  """The values as parameters with the marker `nightly`."""
  return [pytest.param(value, marks=pytest.mark.nightly) for value in values]


def nightly_except(values: Iterable[Any], *kept: Any) -> list[Any]:
  """The values as parameters, all but `kept` with the marker `nightly`."""
  return [value if value in kept else nightly(value)[0] for value in values]
