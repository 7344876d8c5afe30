"""Flags of the commands that read a config file."""

import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from dga_jax import command_line
from dga_jax.files.paths import check_path
from dga_jax.flag_help import wrap

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
    "config",
    None,
    "Config file, such as configs/quickstart.py; --config.KEY=VALUE changes a key.",
    flag_values,
    lock_config=False,
  )
  flag_values["config"].parser = _WithDefaults(flag_values["config"].parser)
  if default is not None:
    flag_values.set_default("config", default)
  return holder


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; --help also lists the config keys.

  A config file that does not exist and an unknown --config.KEY end the process with one line that
  names the closest ones.
  """
  overrides = [match[1] for argument in argv if (match := _OVERRIDE.match(argument))]
  try:
    if overrides:
      _check_keys(overrides)
    return command_line.parse_flags(argv)
  except SystemExit as end:
    if end.code == 0 and "--helpshort" not in argv:  # --help has printed the flags.
      sys.stdout.flush()
      print(f"\n{config_help()}")
    raise
  except (AttributeError, KeyError, OSError, ValueError) as error:
    sys.exit(f"{error}")


def config_help() -> str:
  """The config keys with their defaults, by dataclass, and the file that describes each key."""
  from train.config import TrainConfig

  sections = [
    f"{path}\n  {cls.__name__} in {cls.__module__.replace('.', '/')}.py\n"
    + wrap("  ".join(_key_texts(cls)), "  ")
    for path, cls in _sections("config", TrainConfig)
  ]
  head = "Config keys and their defaults. The docstring of each class describes its keys."
  return "\n\n".join([head, *sections])


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


def _sections(path: str, cls: type) -> Iterator[tuple[str, type]]:
  """A config dataclass and the dataclasses in it, each with its dotted path."""
  from dga_jax.config_dataclasses import nested_dataclasses

  yield path, cls
  for name, inner in nested_dataclasses(cls).items():
    if inner is not None:
      yield from _sections(f"{path}.{name}", inner)


def _key_texts(cls: type) -> Iterator[str]:
  """The fields of a dataclass that are no dataclasses, as name=default, without spaces."""
  from dga_jax.config_dataclasses import is_required, nested_dataclasses

  nested = nested_dataclasses(cls)
  for field in dataclasses.fields(cls):
    if nested[field.name] is None:
      default = "(required)" if is_required(field) else repr(field.default).replace(" ", "")
      yield f"{field.name}={default}"


def _check_config_path(path: str) -> None:
  """Raises ValueError, with the closest files, unless a config file exists.

  ml_collections passes the text after a colon, as in a.py:small, to `get_config`.
  """
  check_path("--config", path)
  file = Path(re.sub(r"(\.py):.*", r"\1", path))
  if file.is_file():
    return
  ours = {found.stem: str(found) for found in sorted(Path("configs").glob("[!_]*.py"))}
  beside = {found.stem: str(found) for found in sorted(file.parent.glob("*.py"))}
  by_stem = ours | beside
  if close := difflib.get_close_matches(file.stem, by_stem, n=3, cutoff=0.5):
    hint = f"Did you mean {' or '.join(by_stem[stem] for stem in close)}?"
  elif ours:
    hint = f"There are {', '.join(ours.values())}."
  else:
    hint = "Run the command in a checkout of dga-jax, whose configs are in configs/."
  raise ValueError(f"--config is {path!r}, and there is no such file. {hint}")


class _WithDefaults(flags.ArgumentParser):
  """The parser of a config flag, followed by `with_defaults`."""

  def __init__(self, parser: flags.ArgumentParser) -> None:
    self._parser = parser

  def parse(self, path: str) -> config_dict.ConfigDict:
    _check_config_path(path)
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
