"""Flags of the commands that read a config file."""

import dataclasses
import re
import sys
import types
import typing
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from dga_jax import command_line

flags.disclaim_key_flags()  # --help lists the flag with those of the module that defines it.

_OVERRIDE = re.compile(r"--?config\.([\w.]+)")


def define_config_flag(
  default: str | None = None, *, flag_values: flags.FlagValues = flags.FLAGS
) -> flags.FlagHolder:
  """Defines --config, a Python file with `get_config()`, and --config.KEY=VALUE for every key.

  The flag's value is a locked ConfigDict with every key of `TrainConfig`: the file's values, and
  the dataclasses' defaults for the other keys.
  """
  holder = config_flags.DEFINE_config_file(
    "config", None, "Config file; --config.KEY=VALUE changes a key.", flag_values, lock_config=False
  )
  flag_values["config"].parser = _WithDefaults(flag_values["config"].parser)
  if default is not None:
    flag_values.set_default("config", default)
  return holder


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; an unknown --config.KEY ends the process with the closest key."""
  overrides = [match[1] for argument in argv if (match := _OVERRIDE.match(argument))]
  try:
    if overrides:
      _check_keys(overrides)
    return command_line.parse_flags(argv)
  except (AttributeError, KeyError, OSError, ValueError) as error:
    sys.exit(f"{error}")


def with_defaults(config: Any) -> config_dict.ConfigDict:
  """A ConfigDict of every key of `TrainConfig`: the values of `config`, and the defaults.

  A key without a default is None until it is set, and keeps its type. The fields of an optional
  dataclass, such as `model.rope_scaling`, are keys only if `config` sets the dataclass.

  Raises:
    ValueError: `config` has an unknown key, named with the closest known one.
  """
  from dga_jax.config_dataclasses import check_keys
  from train.config import TrainConfig

  check_keys(TrainConfig, config, "config")
  complete = config_dict.ConfigDict(_defaults(TrainConfig, None))
  # A value of a wrong type is refused by the dataclass, which names the key and what it wants.
  with complete.ignore_type():
    complete.update(config)
  return complete.lock()


class _WithDefaults(flags.ArgumentParser):
  """The parser of a config flag, followed by `with_defaults`."""

  def __init__(self, parser: flags.ArgumentParser) -> None:
    self._parser = parser

  def parse(self, path: str) -> config_dict.ConfigDict:
    return with_defaults(self._parser.parse(path))


def _check_keys(keys: list[str]) -> None:
  from dga_jax.config_dataclasses import check_key
  from train.config import TrainConfig

  for key in keys:
    check_key(TrainConfig, key, path="config")


def _defaults(cls: type, instance: Any) -> dict[str, Any]:
  """The fields of a dataclass: their values in `instance`, or without one their defaults."""
  from dga_jax.config_dataclasses import is_required, nested_dataclasses

  hints, nested, values = typing.get_type_hints(cls), nested_dataclasses(cls), {}
  for field in dataclasses.fields(cls):
    value = None
    if instance is not None:
      value = getattr(instance, field.name)
    elif field.default_factory is not dataclasses.MISSING:
      value = field.default_factory()
    elif not is_required(field):
      value = field.default
    inner, hint = nested[field.name], hints[field.name]
    if inner is not None and (value is not None or inner is hint):
      value = _defaults(inner, value)
    elif value is None:
      value = config_dict.placeholder(dict if inner is not None else _value_type(hint))
    values[field.name] = value
  return values


def _value_type(hint: Any) -> type:
  """The type of a field's values: int for `int | None`, str for a Literal of strings."""
  if typing.get_origin(hint) in (types.UnionType, typing.Union):
    hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
  if typing.get_origin(hint) is typing.Literal:
    return type(typing.get_args(hint)[0])
  return typing.get_origin(hint) or hint
