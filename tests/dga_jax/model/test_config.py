"""ModelConfig and RopeScaling: invalid values, and the round trip through JSON."""

import dataclasses
import json

import pytest

from dga_jax.config import DGAConfig
from dga_jax.model import ModelConfig, RopeScaling

CONFIG = ModelConfig(
  vocab_size=32,
  num_layers=2,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=24,
)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_kv_heads": 3}, r"num_heads is 4.*multiple of num_kv_heads=3"),
    ({"head_dim": 7}, r"head_dim is 7.*even"),
    ({"attention": "sparse"}, r"attention is 'sparse'.*'dga', 'dense'"),
    ({"remat": "some"}, r"remat is 'some'.*'none', 'full', 'dots'"),
    ({"dtype": "int8"}, r"\.dtype is 'int8'.*'bfloat16'"),
    ({"param_dtype": "float8"}, r"param_dtype is 'float8'"),
    ({"rope_base": 0.0}, r"rope_base is 0\.0"),
    ({"norm_eps": float("nan")}, r"norm_eps is nan"),
    ({"tie_embeddings": 1}, r"tie_embeddings is 1.*bool"),
    ({"qkv_bias": None}, r"qkv_bias is None.*bool"),
    ({"qk_norm": 0}, r"qk_norm is 0.*bool"),
    ({"rope_scaling": 2.0}, r"rope_scaling is 2\.0.*RopeScaling"),
    ({"dga": None}, r"dga is None.*DGAConfig"),
    ({"num_layers": True}, r"num_layers is True"),
    ({"mlp_dim": 24.0}, r"mlp_dim is 24\.0"),
  ],
)
def test_invalid_values_are_errors(changes: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
  "name",
  ["vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"],
)
@pytest.mark.parametrize("value", [0, -2])
def test_sizes_must_be_positive(name: str, value: int) -> None:
  with pytest.raises(ValueError, match=rf"ModelConfig\.{name} is {value}.*from 1 to 2147483647"):
    dataclasses.replace(CONFIG, **{name: value})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"kind": "yarn"}, r"kind is 'yarn'.*'linear', 'llama3'"),
    ({"factor": 0.5}, r"factor is 0\.5.*at least 1"),
    ({"high_freq_factor": 1.0}, r"high_freq_factor is 1\.0.*greater than 1"),
    ({"original_max_position": 0}, r"original_max_position is 0"),
  ],
)
def test_invalid_rope_scaling_is_an_error(changes: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    RopeScaling(**({"kind": "llama3", "factor": 8.0} | changes))


@pytest.mark.parametrize("scaling", [None, RopeScaling("llama3", 8.0, original_max_position=64)])
def test_round_trip_through_json(scaling: RopeScaling | None) -> None:
  config = dataclasses.replace(
    CONFIG, rope_scaling=scaling, dga=DGAConfig(selection="streaming", local_window=2)
  )
  assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_head": 4}, r"no key 'model.num_head'.*'model.num_heads'"),
    ({"dga": {"group_sise": 4}}, r"no key 'model\.dga\.group_sise'.*'model\.dga\.group_size'"),
    ({"rope_scaling": {"kind": "linear", "factr": 2.0}}, r"rope_scaling\.factr'.*scaling\.factor'"),
    ({"zzz": 1}, r"no key 'model.zzz'. Known keys: vocab_size"),
    ({"dga": {"group_size": 0}}, r"^model\.dga\.group_size is 0"),
    ({"dga": 3}, r"model\.dga is 3; it must be a mapping"),
    ({"rope_scaling": {"kind": "linear"}}, r"model\.rope_scaling lacks factor"),
  ],
)
def test_from_dict_names_a_bad_key(changes: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    ModelConfig.from_dict(CONFIG.to_dict() | changes)


def test_from_dict_names_missing_keys() -> None:
  with pytest.raises(ValueError, match="model lacks num_layers, mlp_dim"):
    ModelConfig.from_dict(
      {"vocab_size": 8, "embed_dim": 8, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
    )
