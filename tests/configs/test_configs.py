"""Every config file makes a valid config, and base.py knows every key."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest

from configs import base
from dga_jax import DGAConfig
from dga_jax.model import parameter_count
from train.config import known_keys, make_config, OptimizerConfig, TrainConfig
from train.data.config import DataConfig, RecallConfig

NAMES = sorted(
  path.stem for path in Path(base.__file__).parent.glob("*.py") if path.stem != "__init__"
)


@pytest.mark.parametrize("name", NAMES)
def test_the_config_is_valid(name: str) -> None:
  module = importlib.import_module(f"configs.{name}")
  config = make_config(module.get_config().lock())
  assert parameter_count(config.model) > 0
  assert config.data.kind == "recall" or config.data.vocab_size <= config.model.vocab_size
  assert module.__doc__


def flat_keys(values: dict[str, Any], prefix: str = "") -> set[str]:
  keys = set()
  for name, value in values.items():
    keys.add(prefix + name)
    if isinstance(value, dict):
      keys |= flat_keys(value, f"{prefix}{name}.")
  return keys


def test_base_sets_every_key() -> None:
  inside_an_optional = {key for key in known_keys() if key.startswith("model.rope_scaling.")}
  assert flat_keys(base.get_config().to_dict()) == set(known_keys()) - inside_an_optional


@pytest.mark.parametrize(
  ("cls", "path"),
  [
    (TrainConfig, ""),
    (OptimizerConfig, "optimizer"),
    (DGAConfig, "model.dga"),
    (DataConfig, "data"),
    (RecallConfig, "data.recall"),
  ],
)
def test_base_agrees_with_the_defaults(cls: type, path: str) -> None:
  values = base.get_config().to_dict()
  for part in filter(None, path.split(".")):
    values = values[part]
  for field in dataclasses.fields(cls):
    if field.default is not dataclasses.MISSING and not dataclasses.is_dataclass(field.default):
      assert values[field.name] == field.default, field.name


def test_the_quickstart_has_a_context_of_2048() -> None:
  config = make_config(importlib.import_module("configs.quickstart").get_config())
  assert config.data.sequence_length >= 2048
  assert config.model.attention == "dga"
  assert config.model.dga.selection == "streaming"
