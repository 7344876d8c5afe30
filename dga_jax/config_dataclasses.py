"""What all config dataclasses share: checks of their fields, and conversion from nested dicts.

An error names the field as CLASS.FIELD, such as DGAConfig.group_size. `from_dict` knows the path
from the root of the config, and names the field as in config.model.dga.group_size.
"""

import dataclasses
import difflib
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

LARGEST_SEED = 2**32 - 1  # `jax.random.key` takes 32 bits unless jax_enable_x64 is set.
# Numbers of tokens, steps and rows: the sum of two of them fits JAX's int32.
LARGEST_COUNT = 2**30


def config_error(config: object, name: str, wants: str) -> ValueError:
  """The error for a field with a wrong value.

  Args:
    config: a dataclass.
    name: the field.
    wants: completes "it must be ...".
  """
  got = getattr(config, name)
  return ValueError(f"{type(config).__name__}.{name} is {got!r}; it must be {wants}.")


def require_int(
  config: object, *names: str, least: int, most: int = LARGEST_COUNT, optional: bool = False
) -> None:
  """Checks integers; NumPy integers become ints, which JSON can store.

  Args:
    config: a dataclass, possibly frozen.
    names: the fields.
    least: the smallest value allowed.
    most: the largest value allowed.
    optional: whether None is allowed.

  Raises:
    ValueError: the field, its value and the bounds.
  """
  for name in names:
    value = getattr(config, name)
    if value is None and optional:
      continue
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
      no_bound = most == LARGEST_COUNT and not (whole and value > most)
      bounds = f"of at least {least}" if no_bound else f"from {least} to {most}"
      or_none = ", or None" if optional else ""
      raise config_error(config, name, f"an integer {bounds}{or_none}")
    object.__setattr__(config, name, int(value))


def require_number(
  config: object,
  *names: str,
  least: float | None = None,
  above: float | None = None,
  most: float | None = None,
  below: float | None = None,
  optional: bool = False,
) -> None:
  """Checks finite numbers against closed (least, most) and open (above, below) bounds.

  Args:
    config: a dataclass.
    names: the fields.
    least: the smallest value allowed.
    above: allowed values are greater.
    most: the largest value allowed.
    below: allowed values are smaller.
    optional: whether None is allowed.

  Raises:
    ValueError: the field, its value and the bounds.
  """
  bounds = {"at least": least, "greater than": above, "at most": most, "less than": below}
  wants = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
  for name in names:
    value = getattr(config, name)
    if value is None and optional:
      continue
    if not (
      isinstance(value, int | float)
      and not isinstance(value, bool)
      and math.isfinite(value)
      and (least is None or value >= least)
      and (above is None or value > above)
      and (most is None or value <= most)
      and (below is None or value < below)
    ):
      or_none = ", or None" if optional else ""
      raise config_error(config, name, f"a finite number {wants}{or_none}")


def require_choice(config: object, name: str, choices: Any, *, optional: bool = False) -> None:
  """Raises ValueError unless the field is one of the values of a `Literal`."""
  allowed = (*typing.get_args(choices), *((None,) if optional else ()))
  if getattr(config, name) not in allowed:
    raise config_error(config, name, f"one of {', '.join(map(repr, allowed))}")


def require_type(config: object, name: str, *allowed: type) -> None:
  """Raises ValueError unless the field is an instance of one of the types."""
  if not isinstance(getattr(config, name), allowed):
    raise config_error(config, name, f"of type {' or '.join(t.__name__ for t in allowed)}")


def from_dict[T](cls: type[T], values: Any, *, path: str) -> T:
  """Makes a dataclass, whose fields may be dataclasses, from nested mappings.

  Args:
    cls: the dataclass.
    values: field names to values; a field that is a dataclass takes a mapping or an instance.
      Absent fields take their defaults. Lists, which JSON makes of tuples, become tuples.
    path: the name of `values` in messages, such as "config".

  Raises:
    ValueError: an unknown key, with the closest known one; a missing field; or a value that the
      dataclass refuses, named by its path.
  """
  check_keys(cls, values, path)
  return _build(cls, values, path)


def known_keys(cls: type, prefix: str = "") -> Iterator[str]:
  """Every dotted key of a dataclass and the dataclasses in it, such as `dga.group_size`."""
  for name, nested in nested_dataclasses(cls).items():
    yield prefix + name
    if nested is not None:
      yield from known_keys(nested, f"{prefix}{name}.")


def check_keys(cls: type, values: Any, path: str) -> None:
  """Raises ValueError for a key of nested mappings that is no key of the dataclass."""
  for key in _flat_keys(cls, values, path):
    check_key(cls, key, path=path)


def check_key(cls: type, key: str, *, path: str) -> None:
  """Raises ValueError, with the closest known key, if a dotted key is no key of the dataclass.

  Args:
    cls: the dataclass at the root.
    key: below the root, such as `model.dga.group_size`.
    path: the name of the root in messages, such as "config".
  """
  keys = list(known_keys(cls))
  if key in keys:
    return
  # A right name at the wrong level is the commonest slip, then a misspelt one.
  name = key.rpartition(".")[2]
  same_name = [known for known in keys if known.rpartition(".")[2] == name]
  close = same_name or difflib.get_close_matches(key, keys, n=1)
  hint = f"Did you mean '{path}.{close[0]}'?" if close else f"Known keys: {', '.join(keys)}."
  raise ValueError(f"There is no key '{path}.{key}'. {hint}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested mappings by dotted key; tuples become lists, as JSON makes them."""
  flat: dict[str, Any] = {}
  for name, value in values.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = list(value) if isinstance(value, tuple) else value
  return flat


@functools.cache  # Evaluating annotations takes most of the time of `from_dict`.
def nested_dataclasses(cls: type) -> Mapping[str, type | None]:
  """The fields of a dataclass, each with the dataclass that it holds, or None."""
  hints = typing.get_type_hints(cls)
  return {name: _dataclass_in(hints[name]) for name in field_names(cls)}


def field_names(cls: type) -> tuple[str, ...]:
  """The names of a dataclass's fields."""
  return tuple(field.name for field in dataclasses.fields(cls))


def is_required(field: dataclasses.Field) -> bool:
  """Whether a dataclass field has no default."""
  return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _flat_keys(cls: type, values: Any, path: str, prefix: str = "") -> Iterator[str]:
  if not hasattr(values, "keys"):
    where = f"{path}.{prefix}".rstrip(".")
    raise ValueError(f"{where} is {values!r}; it must be a mapping of {cls.__name__}'s fields.")
  nested = nested_dataclasses(cls)
  for name in values:
    yield f"{prefix}{name}"
    inner, value = nested.get(name), values[name]
    if inner is not None and value is not None and not isinstance(value, inner):
      yield from _flat_keys(inner, value, path, f"{prefix}{name}.")


def _build(cls: type, values: Any, path: str) -> Any:
  fields = dataclasses.fields(cls)
  missing = [field.name for field in fields if is_required(field) and field.name not in values]
  if missing:
    raise ValueError(f"{path} lacks {', '.join(missing)}.")
  nested, arguments = nested_dataclasses(cls), {}
  for name in values:
    value, inner = values[name], nested[name]
    if inner is not None and value is not None and not isinstance(value, inner):
      value = _build(inner, value, f"{path}.{name}")
    arguments[name] = tuple(value) if isinstance(value, list) else value
  try:
    return cls(**arguments)
  except ValueError as error:
    prefix = f"{cls.__name__}."
    if not str(error).startswith(prefix):
      raise
    raise ValueError(f"{path}.{str(error).removeprefix(prefix)}") from error


def _dataclass_in(hint: Any) -> type | None:
  """The dataclass of a field's annotation, such as RopeScaling of `RopeScaling | None`."""
  is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
  options = typing.get_args(hint) if is_union else (hint,)
  for option in options:
    if isinstance(option, type) and dataclasses.is_dataclass(option):
      return option
  return None
