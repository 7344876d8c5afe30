"""config.json: every key is implemented, has no effect, or is refused; all forms of RoPE."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dga_jax.conversion.errors import ConversionError
from dga_jax.conversion.hugging_face import HuggingFaceFolder
from dga_jax.conversion.hugging_face_config import config_from_values, values_from_config
from dga_jax.model import ModelConfig
from dga_jax.model.attention_kinds.sliding_window import SlidingWindowConfig
from dga_jax.model.rope import inverse_frequencies
from tests.dga_jax.conversion.folders import (
  copy_of,
  FAMILIES,
  GOLDEN,
  import_folder,
  set_keys,
)

FULL, SLIDING = "full_attention", "sliding_attention"


def stored(family: str, **changes: Any) -> dict[str, Any]:
  """A golden config.json with changes. Its keys of RoPE are removed first."""
  values = json.loads((GOLDEN / family / "config.json").read_text())
  values.pop("rope_parameters")
  return values | changes


def read(family: str = "llama2", **changes: Any) -> ModelConfig:
  return config_from_values(stored(family, **changes), "float32")


def frequencies(config: ModelConfig) -> np.ndarray:
  return inverse_frequencies(config.head_dim, base=config.rope_base, scaling=config.rope_scaling)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  return copy_of("llama2", tmp_path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "gpt2"}, "model_type='gpt2'; supported are llama, mistral, qwen2, qwen3"),
    ({"model_type": None}, "lacks model_type"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures=.*LlamaForCausalLM"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
    ({"attention_bias": True}, "attention_bias=True; only False"),
    ({"mlp_bias": True}, "mlp_bias=True; only False"),
    ({"quantization_config": {"bits": 4}}, "quantization_config=.*only None"),
    (
      {"layer_types": ["full_attention", "sliding_attention"]},
      "'sliding_attention' in layer_types",
    ),
    ({"layer_types": ["full_attention"]}, "layer_types=.*a list of 2 types"),
    ({"layer_types": [None, {}]}, "None in layer_types"),
    ({"sliding_window": 8}, "sliding_window=8; it must be null for this model_type"),
    ({"use_sliding_window": True}, "use_sliding_window=True; it must be false"),
    ({"head_dim": "8"}, "head_dim='8'; it must be an integer"),
    ({"head_dim": 8.0}, "head_dim=8.0; it must be an integer"),
    ({"vocab_size": True}, "vocab_size=True; it must be an integer"),
    ({"hidden_size": 10**30}, "hidden_size=10+; it must be an integer from 1 to 2147483647"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'; it must be a finite number"),
    ({"rms_norm_eps": 0}, "norm_eps is 0.0; it must be .* greater than 0"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings=1; it must be true or false"),
    ({"num_hidden_layers": 10**9}, "has 21 tensors, too few for 1000000000 layers"),
    ({"max_position_embeddings": []}, r"max_position_embeddings=\[\]; it must be an integer"),
    ({"logits_scaling": 8.0}, "logits_scaling=8.0; only 1 is"),
    ({"embedding_multiplier": 12}, "embedding_multiplier=12; only 1 is"),
    ({"residual_multiplier": 0.2}, "residual_multiplier=0.2; only 1 is"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0; only None is"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0; only None is"),
    ({"num_local_experts": 8}, "num_local_experts=8; only None is"),
    ({"is_causal": False}, "is_causal=False; only True is"),
    ({"use_qk_norm": True}, "use_qk_norm=True; only False is"),
    ({"rope_interleaved": True}, "rope_interleaved=True; only False is"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; only 1 is"),
    ({"attn_scale": 0.1}, "unknown key attn_scale=0.1, which may change .*--ignore_keys"),
    ({"rope_tehta": 5.0}, "unknown key rope_tehta=5.0.* Did you mean rope_theta?"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'; supported"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'; supported"),
    ({"rope_scaling": {"type": "linear"}}, "lacks rope_scaling.factor"),
    ({"num_attention_heads": 0}, "num_attention_heads=0; it must be an integer"),
    ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
    ({"num_key_value_heads": 3}, "num_heads is 4.*multiple of num_kv_heads=3"),
    ({"num_hidden_layers": 3}, r"lacks the tensors model\.layers\.2\..* and 4 more"),
    ({"num_hidden_layers": 1}, r"no parameter for the tensors model\.layers\.1\..* and 4 more"),
    (
      {"intermediate_size": 41},
      r"model\.layers\.0\.mlp\.gate_proj\.weight is \[40, 32\].*\[41, 32\]",
    ),
    ({"vocab_size": 65}, r"embed_tokens\.weight is \[64, 32\]; .* must be \[65, 32\]"),
    ({"tie_word_embeddings": True}, r"lm_head\.weight differs from model\.embed_tokens\.weight"),
  ],
)
def test_configs_that_are_refused(
  changes: dict, message: str, folder: Path, tmp_path: Path
) -> None:
  set_keys(folder / "config.json", **changes)
  with pytest.raises(ConversionError, match=message) as error:
    import_folder(folder, tmp_path / "run")
  assert str(folder) in str(error.value)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "changes",
  [
    {"pretraining_tp": 4},
    {"architectures": ["LLaMAForCausalLM"]},
    {"architectures": None},
    {"attention_bias": None, "mlp_bias": None, "quantization_config": None},
    {"unknown": None},
    {"hidden_act": "swish"},
    {"head_dim": None},
    {"num_key_value_heads": None},
    {"rms_norm_eps": None, "use_cache": None, "rope_theta": None},
    {"use_sliding_window": False, "max_window_layers": 3, "layer_types": [FULL, FULL]},
    {"transformers.js_config": {"dtype": "q4"}, "is_llama_config": True},
    {"temperature": 0.6, "max_length": 4096, "_name_or_path": "x", "attention_dropout": 0.1},
    {"embedding_multiplier": 1.0, "logits_scaling": 1, "partial_rotary_factor": 1.0},
  ],
)
def test_keys_without_effect_are_accepted(changes: dict) -> None:
  expected = read()
  if "rms_norm_eps" in changes:
    expected = read(rms_norm_eps=1e-6)  # The default of transformers.
  assert read(**changes) == expected


def test_an_unknown_key_can_be_ignored_by_name(folder: Path) -> None:
  set_keys(folder / "config.json", note=1)
  with pytest.raises(ConversionError, match="unknown key note=1"):
    HuggingFaceFolder(folder).config()
  expected = HuggingFaceFolder(GOLDEN / "llama2").config()
  assert HuggingFaceFolder(folder, ["note"]).config() == expected
  set_keys(folder / "config.json", rope_parameters={"rope_theta": 1e4, "note": 1})
  with pytest.raises(ConversionError, match=r"unknown key rope_parameters\.note=1"):
    HuggingFaceFolder(folder, ["note"]).config()
  assert HuggingFaceFolder(folder, ["note", "rope_parameters.note"]).config() == expected


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "is damaged"),
    ("[1]", "holds a list; it must be an object"),
    ('{"hidden_size": NaN}', "the number NaN"),
    ('{"hidden_size": 1e999}', "the number 1e999, which is too large"),
    ('{"hidden_size": 1, "hidden_size": 2}', "the key 'hidden_size' twice"),
    ('{"a": ' + "[" * 100_000, "is damaged"),
    ('{"a": ' + "9" * 5000 + "}", "is damaged"),
    ('{"a": "' + "x" * (9 << 20) + '"}', "more than 8388608 bytes"),
  ],
)
def test_json_that_is_refused(text: str, message: str, folder: Path) -> None:
  (folder / "config.json").write_text(text)
  with pytest.raises(ConversionError, match=message) as error:
    HuggingFaceFolder(folder)
  assert "config.json" in str(error.value)


@pytest.mark.parametrize(
  ("changes", "base", "factor"),
  [
    ({}, 10000.0, 1.0),
    ({"rope_theta": 500.0}, 500.0, 1.0),
    ({"rope_theta": 500, "rope_scaling": None}, 500.0, 1.0),
    ({"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4}}, 500.0, 4.0),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, 10000.0, 2.5),
    ({"rope_scaling": {"rope_type": "default", "type": "default"}}, 10000.0, 1.0),
    ({"rope_scaling": {"factor": 1.0}}, 10000.0, 1.0),
    ({"rope_scaling": {}}, 10000.0, 1.0),
    ({"rope_parameters": {"rope_theta": 500.0}}, 500.0, 1.0),
    ({"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 1.0}}, 500.0, 1.0),
    ({"rope_theta": 500.0, "rope_parameters": {"rope_theta": 500.0}}, 500.0, 1.0),
    (
      {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}},
      500.0,
      4.0,
    ),
    (
      {"rope_parameters": {FULL: {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}}},
      500.0,
      4.0,
    ),
    (
      {
        "rope_parameters": {
          FULL: {"rope_theta": 500.0, "rope_type": "default"},
          SLIDING: {"rope_theta": 10.0, "rope_type": "yarn", "factor": 3.0},
        }
      },
      500.0,
      1.0,
    ),
    (
      {
        "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
      },
      500.0,
      4.0,
    ),
  ],
)
def test_frequencies_of_rope(changes: dict, base: float, factor: float) -> None:
  got = frequencies(read(**changes))
  np.testing.assert_allclose(got, [base ** (-c / 4) / factor for c in range(4)], rtol=1e-12)


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters", "nested"])
@pytest.mark.parametrize("original", ["inside", "beside", "context"])
def test_frequencies_of_llama3(form: str, original: str) -> None:
  """Wavelengths below 32/4 are kept, those above 32/1 stretched by 8, the others interpolated."""
  scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
  changes: dict[str, Any] = {"rope_theta": 500.0}
  if original == "inside":
    scaling["original_max_position_embeddings"] = 32
  elif original == "beside":
    changes["original_max_position_embeddings"] = 32
    scaling["original_max_position_embeddings"] = 64  # transformers prefers the top-level key.
  else:
    changes["max_position_embeddings"] = 32
  if form == "rope_scaling":
    changes["rope_scaling"] = scaling
  else:
    scaling["rope_theta"] = 500.0
    changes["rope_parameters"] = {FULL: scaling} if form == "nested" else scaling
  expected = []
  for c in range(4):
    plain = 500.0 ** (-c / 4)
    wavelength = 2 * math.pi / plain
    smooth = (32 / wavelength - 1) / 3
    blended = (1 - smooth) * plain / 8 + smooth * plain
    between = 8 <= wavelength <= 32
    expected.append(blended if between else plain / 8 if wavelength > 32 else plain)
  np.testing.assert_allclose(frequencies(read(**changes)), expected, rtol=1e-12)
  assert expected[0] == 1.0
  assert expected[3] == 500.0**-0.75 / 8


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rope_scaling": {"factor": 4.0}}, "factor=4.0 without a rope_type"),
    ({"rope_parameters": {"rope_theta": 5e5, "factor": 4.0}}, "factor=4.0 without a rope_type"),
    ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "factor=4.0; only 1 is"),
    ({"rope_scaling": {"type": "linear"}}, "lacks rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5; it must be .* at least"),
    ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor='4'; it must be a finite number"),
    ({"rope_scaling": {"name": "linear", "alpha": 4.0}}, "unknown key rope_scaling.name='linear'"),
    (
      {"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 1}},
      "unknown key rope_scaling.alpha=1",
    ),
    (
      {"rope_scaling": {"type": "linear", "rope_type": "llama3"}},
      "'llama3', but rope_scaling.type='linear'",
    ),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 2]}}, "the rope type 'mrope'"),
    ({"rope_scaling": {"type": 3}}, "type=3; it must be a string"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear'; it must be an object"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "lacks rope_scaling.low_freq_factor"),
    (
      {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
      "partial_rotary_factor=0.5; only 1 is",
    ),
    ({"rope_theta": -1.0}, "rope_base is -1.0; it must be"),
    ({"rope_theta": True}, "rope_theta=True; it must be a finite number"),
    (
      {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
      "rope_theta=5.0, but rope_parameters.rope_theta=6.0",
    ),
    (
      {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}},
      "both rope_scaling and rope_parameters",
    ),
    ({"rope_parameters": {FULL: {"rope_type": "yarn", "factor": 2.0}}}, "the rope type 'yarn'"),
    ({"rope_parameters": {SLIDING: {"rope_theta": 5.0}}}, "no rope_parameters.full_attention"),
    (
      {"rope_parameters": {FULL: None, SLIDING: {"rope_theta": 5.0}}},
      "no rope_parameters.full_att",
    ),
    ({"rope_parameters": {FULL: {"rope_theta": 5.0}, "rope_theta": 5.0}}, "beside objects for"),
    ({"rope_parameters": {FULL: 5.0}}, "full_attention=5.0; it must be an object"),
  ],
)
def test_rope_that_is_refused(changes: dict, message: str) -> None:
  with pytest.raises(ConversionError, match=message) as error:
    read(**changes)
  assert "config.json" in str(error.value)


@pytest.mark.parametrize(
  ("family", "changes", "window"),
  [
    ("mistral", {"sliding_window": None}, None),
    ("mistral", {"sliding_window": 16}, 16),
    ("mistral", {"layer_types": [SLIDING, SLIDING]}, 8),
    ("qwen2", {}, None),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, None),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}, None),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": [SLIDING] * 2}, 8),
    (
      "qwen3",
      {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": None,
        "max_window_layers": 0,
      },
      8,
    ),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, None),
    ("qwen2", {"attention_bias": True}, None),
  ],
)
def test_windows(family: str, changes: dict, window: int | None) -> None:
  config = read(family, **changes)
  assert config.attention == ("dense" if window is None else "sliding_window")
  if window is not None:
    assert config.sliding_window == SlidingWindowConfig(window)
    written = values_from_config(config, {"model_type": family})
    assert config_from_values(written, "float32") == config


@pytest.mark.parametrize(
  ("family", "changes", "message"),
  [
    (
      "qwen2",
      {"use_sliding_window": True, "sliding_window": 8, "layer_types": [FULL, SLIDING]},
      "layers with a sliding window and layers without",
    ),
    (
      "qwen2",
      {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": None,
        "max_window_layers": 1,
      },
      "layers with a sliding window and layers without",
    ),
    ("qwen2", {"layer_types": [SLIDING, SLIDING]}, "'sliding_attention' in layer_types"),
    ("mistral", {"layer_types": [FULL, FULL]}, "'full_attention' in layer_types"),
    ("mistral", {"sliding_window": 0}, "sliding_window=0; it must be an integer of at least 1"),
    ("mistral", {"attention_bias": True}, "attention_bias=True; only False"),
  ],
)
def test_windows_that_are_refused(family: str, changes: dict, message: str) -> None:
  with pytest.raises(ConversionError, match=message):
    read(family, **changes)


def test_defaults_of_missing_keys_equal_those_of_transformers() -> None:
  values = stored("qwen3", num_attention_heads=32, hidden_size=4096)
  for key in ("head_dim", "num_key_value_heads", "rms_norm_eps"):
    values.pop(key)
  config = config_from_values(values, "float32")
  assert (config.head_dim, config.num_kv_heads, config.norm_eps) == (128, 32, 1e-6)
  values = stored("mistral", num_attention_heads=32, hidden_size=4096)
  for key in ("head_dim", "num_key_value_heads", "sliding_window"):
    values.pop(key, None)
  config = config_from_values(values, "float32")
  assert (config.head_dim, config.num_kv_heads, config.sliding_window.window) == (128, 8, 4096)


@pytest.mark.parametrize("family", FAMILIES)
def test_older_and_newer_forms_of_rope_are_equivalent(family: str) -> None:
  values = json.loads((GOLDEN / family / "config.json").read_text())
  new = config_from_values(values, "float32")
  scaling = values.pop("rope_parameters")
  old = values | {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
  assert config_from_values(old, "float32") == new
