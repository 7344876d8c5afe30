"""Every config file is valid and sets only keys that differ from the dataclasses' defaults."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest

import configs
from dga_jax.config_dataclasses import is_required, nested_dataclasses
from dga_jax.model import parameter_count
from train.config import make_config, TrainConfig

NAMES = sorted(
  path.stem for path in Path(configs.__file__).parent.glob("*.py") if path.stem != "__init__"
)


def values_of(name: str) -> dict[str, Any]:
  return importlib.import_module(f"configs.{name}").get_config().to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_the_config_is_valid(name: str) -> None:
  config = make_config(values_of(name))
  assert parameter_count(config.model) > 0
  assert config.data.kind != "text" or config.data.vocab_size <= config.model.vocab_size
  assert importlib.import_module(f"configs.{name}").__doc__


def repeated_defaults(cls: type, values: dict[str, Any], prefix: str = "") -> list[str]:
  """The keys whose value equals the default of the dataclass."""
  found = []
  nested = nested_dataclasses(cls)
  for field in dataclasses.fields(cls):
    if field.name not in values:
      continue
    value, inner = values[field.name], nested[field.name]
    if inner is not None and value is not None:
      found += repeated_defaults(inner, value, f"{prefix}{field.name}.")
    elif not is_required(field) and field.default == value:
      found.append(f"{prefix}{field.name}")
  return found


@pytest.mark.parametrize("name", NAMES)
def test_configs_do_not_repeat_defaults(name: str) -> None:
  assert repeated_defaults(TrainConfig, values_of(name)) == []


def test_repeated_defaults_are_detected() -> None:
  values = {"seed": 0, "num_steps": 7, "model": {"dga": {"group_size": 16, "seed": 3}}}
  assert repeated_defaults(TrainConfig, values) == ["model.dga.group_size", "seed"]


def test_the_quickstart_has_a_context_of_2048() -> None:
  config = make_config(values_of("quickstart"))
  assert config.data.sequence_length >= 2048
  assert config.model.attention == "dga"
  assert config.model.dga.selection == "streaming"
