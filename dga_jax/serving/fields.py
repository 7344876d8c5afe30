"""The fields of a request's JSON object, read one by one and checked."""

from collections.abc import Mapping
from typing import Any

from dga_jax.serving.errors import APIError, invalid, unsupported


class Fields:
  """Takes fields out of a JSON object; `finish` refuses the fields that are left.

  A field that is null counts as absent.

  Args:
    body: the JSON value of a request.

  Raises:
    APIError: the value is not an object.
  """

  def __init__(self, body: Any) -> None:
    if not isinstance(body, dict):
      raise invalid(None, "The body must be a JSON object.")
    self._left = {name: value for name, value in body.items() if value is not None}

  def take(self, name: str) -> Any:
    """The value of a field; None if it is absent."""
    return self._left.pop(name, None)

  def integer(self, name: str, default: Any, least: int, most: int) -> Any:
    """An integer in a range, or the default."""
    value = self._left.pop(name, None)
    if value is None:
      return default
    if type(value) is not int or not least <= value <= most:
      raise _wrong(name, value, f"an integer from {least} to {most}")
    return value

  def number(self, name: str, default: float, least: float, most: float) -> float:
    """A number in a range, or the default. NaN is outside every range."""
    value = self._left.pop(name, None)
    if value is None:
      return default
    if type(value) not in (int, float) or not least <= value <= most:
      raise _wrong(name, value, f"a number from {least:g} to {most:g}")
    return float(value)

  def flag(self, name: str) -> bool:
    """A boolean, false by default."""
    value = self._left.pop(name, False)
    if not isinstance(value, bool):
      raise _wrong(name, value, "true or false")
    return value

  def text(self, name: str) -> str:
    """A string that must be there."""
    value = self._left.pop(name, None)
    if not isinstance(value, str):
      raise _wrong(name, value, "a string")
    return value

  def strings(self, name: str, most: int) -> list[str]:
    """A string or a list of at most `most` of them, none of them empty."""
    value = self._left.pop(name, None)
    values = [] if value is None else [value] if isinstance(value, str) else value
    is_valid = isinstance(values, list) and len(values) <= most
    if not is_valid or not all(isinstance(text, str) and 0 < len(text) <= 1000 for text in values):
      raise _wrong(name, value, f"a string, or a list of at most {most}, of 1 to 1000 characters")
    return values

  def integers(self, name: str, most: int) -> list[int]:
    """A list of at most `most` integers of at least 0."""
    value = self._left.pop(name, [])
    is_valid = isinstance(value, list) and len(value) <= most
    if not is_valid or not all(type(one) is int and 0 <= one < 2**31 for one in value):
      raise _wrong(name, value, f"a list of at most {most} token ids")
    return list(value)

  def mapping(self, name: str) -> dict[str, Any]:
    """An object; empty by default."""
    value = self._left.pop(name, {})
    if not isinstance(value, dict):
      raise _wrong(name, value, "an object")
    return value

  def finish(self, neutral: Mapping[str, tuple[Any, ...]], ignored: frozenset[str]) -> None:
    """Refuses the fields that are left.

    Args:
      neutral: fields that this server does not support, with the values that have no effect.
      ignored: fields that do not change the answer.

    Raises:
      APIError: names the first field that is not supported.
    """
    for name, value in self._left.items():
      if name in ignored:
        continue
      if name not in neutral:
        raise unsupported(name, f"{name!r} is not a parameter of this endpoint; leave it out.")
      if not any(type(value) is type(one) and value == one for one in neutral[name]):
        raise unsupported(name, f"{name!r} is not supported by this server; leave it out.")


def _wrong(name: str, value: Any, wanted: str) -> APIError:
  return invalid(name, f"{name} is {value!r:.100}; it must be {wanted}.")
