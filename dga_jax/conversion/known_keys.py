"""Typed access to the values of a file, and the tables of the keys that a format may have.

Every key of a format is in a table. A key that is in none may change what the model computes, so
it is an error that names the key.
"""

import dataclasses
import difflib
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dga_jax.conversion.errors import ConversionError, shown

_MAX_INTEGER = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class KnownKeys:
  """The keys of one mapping in a file.

  Attributes:
    read: keys that the reader computes with.
    unused: keys that change nothing in the logits of the decoder.
    fixed: keys of features that the decoder lacks, with the values that leave the feature off.
  """

  read: frozenset[str]
  unused: frozenset[str] = frozenset()
  fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

  def check(self, values: "Values", ignored_keys: Collection[str] = ()) -> None:
    """Raises ConversionError for an unknown key, or one of `fixed` with another value.

    Args:
      values: the mapping. A key whose value is null counts as absent.
      ignored_keys: unknown keys, by their full names, that the user says change nothing.
    """
    for key in values:
      if key in self.fixed:
        self._check_fixed(values, key)
      elif key in self.read or key in self.unused or f"{values.prefix}{key}" in ignored_keys:
        continue
      else:
        known = self.read | self.fixed.keys()
        close = difflib.get_close_matches(key, known, n=1) if len(key) < 100 else []
        hint = f" Did you mean {values.prefix}{close[0]}?" if close else ""
        raise ConversionError(
          f"{values.where} has the unknown key {values.prefix}{shown(key)[1:-1]}="
          f"{shown(values[key])}, which may change what the model computes. Delete it, or name it "
          f"in --ignore_keys if it changes nothing.{hint}"
        )

  def _check_fixed(self, values: "Values", key: str) -> None:
    allowed = self.fixed[key]
    if not any(_same(values[key], value) for value in allowed):
      raise ConversionError(
        f"{values.where} has {values.prefix}{key}={shown(values[key])}; only "
        f"{shown(allowed[0] if allowed else None)} is supported."
      )


class Values:
  """A mapping from a file, whose values are checked when they are read.

  Iteration gives the keys whose value is not null. Every method raises ConversionError, which
  names the file and the key, for a value of another type or out of bounds. A default stands for
  an absent key; without one the key is required.

  Args:
    values: the mapping.
    where: the file, for messages.
    prefix: what messages put before every key, such as the object's own key and a dot.
  """

  def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
    self.where, self.prefix = where, prefix
    self._values = values

  def __contains__(self, key: str) -> bool:
    return self._values.get(key) is not None

  def __iter__(self) -> Iterator[str]:
    return (key for key, value in self._values.items() if value is not None)

  def __getitem__(self, key: str) -> Any:
    return self._values.get(key)

  def absent(self, key: str) -> bool:
    """Whether the mapping lacks the key; a key whose value is null is not absent."""
    return key not in self._values

  def integer(
    self, key: str, default: int | None = None, *, least: int = 1, most: int = _MAX_INTEGER
  ) -> int:
    """An integer of at least `least` and at most `most`."""
    value = self._get(key, default)
    if type(value) is not int or not least <= value <= most:
      bound = f"of at least {least}" if isinstance(value, int) and value < least else ""
      bound = bound or f"from {least} to {most}"
      raise self.error(key, f"an integer {bound}")
    return value

  def number(self, key: str, default: float | None = None) -> float:
    """A finite number."""
    value = self._get(key, default)
    if type(value) not in (int, float) or abs(value) > 1e300 or math.isnan(value):
      raise self.error(key, "a finite number")
    return float(value)

  def boolean(self, key: str, default: bool | None = None) -> bool:
    """True or false."""
    value = self._get(key, default)
    if type(value) is not bool:
      raise self.error(key, "true or false")
    return value

  def string(self, key: str, default: str | None = None) -> str:
    """A string."""
    value = self._get(key, default)
    if type(value) is not str:
      raise self.error(key, "a string")
    return value

  def mapping(self, key: str) -> "Values | None":
    """A nested object, None where it is absent or empty."""
    value = self[key]
    if value is not None and not isinstance(value, dict):
      raise self.error(key, "an object")
    return Values(value, self.where, f"{self.prefix}{key}.") if value else None

  def error(self, key: str, wants: str) -> ConversionError:
    """The error for the value of `key`, which must be `wants`."""
    got = f"{self.where} has {self.prefix}{key}={shown(self[key])}"
    return ConversionError(f"{got}; it must be {wants}.")

  def _get(self, key: str, default: Any) -> Any:
    value = self[key]
    if value is None and default is None:
      raise ConversionError(f"{self.where} lacks {self.prefix}{key}.")
    return default if value is None else value


def _same(value: object, allowed: object) -> bool:
  """Whether two values are equal; a boolean equals no number, and an array nothing."""
  if isinstance(value, bool) != isinstance(allowed, bool) or not isinstance(
    value, bool | int | float | str
  ):
    return False
  return value == allowed
