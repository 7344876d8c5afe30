"""Configs: JSON round trips, errors of unknown keys, and the keys that may change on resume."""

import dataclasses
import json
from typing import Any

import pytest

from dga_jax import DGAConfig
from dga_jax.config_dataclasses import check_key
from dga_jax.model import RopeScaling
from train.config import check_resumable, make_config, to_dict, TrainConfig


def change(config: TrainConfig, key: str, value: Any) -> dict[str, Any]:
  """`to_dict` of the config with the value of a dotted key replaced."""
  values: dict[str, Any] = to_dict(config)
  *path, name = key.split(".")
  inner = values
  for part in path:
    inner = inner[part]
  inner[name] = value
  return values


def test_round_trip_through_json(config: TrainConfig) -> None:
  model = dataclasses.replace(
    config.model, rope_scaling=RopeScaling("linear", 2.0), dga=DGAConfig(focal_per_block=3)
  )
  config = dataclasses.replace(config, model=model)
  assert make_config(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
  ("key", "closest"),
  [
    ("learing_rate", "learning_rate"),
    ("model.num_layer", "model.num_layers"),
    ("model.dga.group_sise", "model.dga.group_size"),
    ("group_size", "model.dga.group_size"),
    ("model.learning_rate", "learning_rate"),
    ("optimiser.b1", "optimizer.b1"),
    ("model.rope_scaling.facto", "model.rope_scaling.factor"),
  ],
)
def test_an_unknown_key_is_named_with_the_closest(key: str, closest: str) -> None:
  with pytest.raises(ValueError, match=f"'config.{key}'.*'config.{closest}'"):
    check_key(TrainConfig, key, path="config")


def test_an_unknown_key_in_a_file(config: TrainConfig) -> None:
  with pytest.raises(ValueError, match=r"'config\.model\.dga\.group_sise'.*group_size'"):
    make_config(change(config, "model.dga.group_sise", 3))


def test_a_missing_key(config: TrainConfig) -> None:
  values = to_dict(config)
  del values["model"]["num_layers"]
  with pytest.raises(ValueError, match=r"config\.model lacks num_layers"):
    make_config(values)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("num_steps", 0),
    ("learning_rate", -1.0),
    ("grad_accumulation", 3),
    ("warmup_steps", 12),
    ("checkpoint_every", 0),
    ("loss_chunk", 0),
    ("optimizer.b1", 1.0),
    ("optimizer.clip_norm", 0.0),
    ("optimizer.final_rate", 2.0),
    ("model.num_kv_heads", 5),
    ("model.dga.importance_rate", 1.5),
    ("data.sequence_length", 1),
  ],
)
def test_an_invalid_value_is_an_error_with_the_key(
  key: str, value: Any, config: TrainConfig
) -> None:
  name = key.rpartition(".")[2]
  with pytest.raises(ValueError, match=name):
    make_config(change(config, key, value))


@pytest.mark.parametrize("key", ["seed", "model.dga.seed"])
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_has_32_bits(key: str, seed: int, config: TrainConfig) -> None:
  with pytest.raises(ValueError, match=rf"config\.{key} is {seed}; .*from 0 to 4294967295"):
    make_config(change(config, key, seed))


def test_a_wrong_type_is_an_error_with_the_key(config: TrainConfig) -> None:
  with pytest.raises(ValueError, match=r"config\.num_steps is '12'"):
    make_config(change(config, "num_steps", "12"))


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("num_steps", 13),
    ("model.dga.n_recent", 8),
    ("optimizer.b2", 0.99),
    ("data.tokenizer", "bpe"),
    ("budgets", "b.json"),
  ],
)
def test_keys_that_change_the_run_must_not_change_on_resume(
  key: str, value: Any, config: TrainConfig
) -> None:
  saved = json.loads(json.dumps(change(config, key, value)))
  with pytest.raises(ValueError, match=rf"config\.{key} is .* was started with {value!r}"):
    check_resumable(config, saved)


def test_a_key_newer_than_the_checkpoint_has_its_default(config: TrainConfig) -> None:
  saved = to_dict(config)
  del saved["guard"], saved["model"]["qk_norm"]
  check_resumable(config, saved)
  changed = dataclasses.replace(config, model=dataclasses.replace(config.model, qk_norm=True))
  with pytest.raises(ValueError, match=r"config\.model\.qk_norm is True, .* started with False"):
    check_resumable(changed, saved)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("log_every", 1),
    ("data.prefetch_batches", 0),
    ("data.train_files", ["elsewhere/*.txt"]),
    ("grad_accumulation", 4),
    ("model.remat", "full"),
  ],
)
def test_other_keys_may_change_on_resume(key: str, value: Any, config: TrainConfig) -> None:
  check_resumable(config, change(config, key, value))


def test_a_checkpoint_decides_whether_the_model_has_a_selector(config: TrainConfig) -> None:
  values = change(config, "model.dga", {"selection": "streaming", "selector": "fitted"})
  values["model"]["attention"] = "dga"
  with pytest.raises(ValueError, match=r"focal_selector is False.*dga fit_selector"):
    make_config(values)
  assert make_config({**values, "init_from": "selector"}).model.dga.selector == "fitted"
