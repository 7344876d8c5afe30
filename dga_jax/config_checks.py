"""Checks of config fields. Each raises ValueError with the field, its value and valid values."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def require(config: object, name: str, holds: bool, wants: str) -> None:
  """Raises ValueError unless `holds`.

  Args:
    config: the dataclass that is checked.
    name: the field that the message names.
    holds: whether the field's value is valid.
    wants: the valid values, as in "a bool"; completes "it must be".
  """
  if not holds:
    got = getattr(config, name)
    raise ValueError(f"{type(config).__name__}.{name} is {got!r}; it must be {wants}.")


def require_choice(config: object, name: str, choices: Sequence[Any]) -> None:
  """The field is one of `choices`."""
  wants = f"one of {', '.join(map(repr, choices))}"
  require(config, name, getattr(config, name) in choices, wants)


def require_bool(config: object, name: str) -> None:
  """The field is a bool."""
  require(config, name, isinstance(getattr(config, name), bool), "a bool")


def require_instance(config: object, name: str, *types: type) -> None:
  """The field is an instance of one of `types`."""
  wants = f"of type {' or '.join(t.__name__ for t in types)}"
  require(config, name, isinstance(getattr(config, name), types), wants)


def require_int(config: object, name: str, *, least: int) -> None:
  """The field is an integer, not a bool, of at least `least`."""
  value = getattr(config, name)
  whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
  require(config, name, whole and value >= least, f"an integer of at least {least}")


def require_number(
  config: object,
  name: str,
  *,
  above: float = -math.inf,
  least: float = -math.inf,
  most: float = math.inf,
) -> None:
  """The field is a finite number, not a bool, with above < value and least ≤ value ≤ most."""
  value = getattr(config, name)
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  bounds = [
    *([f"greater than {above}"] if above > -math.inf else []),
    *([f"at least {least}"] if least > -math.inf else []),
    *([f"at most {most}"] if most < math.inf else []),
  ]
  inside = is_number and math.isfinite(value) and above < value and least <= value <= most
  require(config, name, inside, f"a finite number {' and '.join(bounds)}".rstrip())
