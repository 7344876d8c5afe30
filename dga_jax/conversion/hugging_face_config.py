"""Hugging Face's config.json of the LLaMA family, to ModelConfig and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dga_jax.model import ModelConfig, RopeScaling
from dga_jax.model.attention_kinds.sliding_window import SlidingWindowConfig
from dga_jax.model.config import DtypeName


@dataclasses.dataclass(frozen=True)
class Family:
  """What a `model_type` stands for.

  Attributes:
    architecture: the class of transformers.
    qkv_bias: as in ModelConfig.
    qk_norm: as in ModelConfig.
    windowed: whether `sliding_window` holds in every layer; the default is then 4096.
  """

  architecture: str
  qkv_bias: bool = False
  qk_norm: bool = False
  windowed: bool = False


FAMILIES = {
  "llama": Family("LlamaForCausalLM"),  # SmolLM, too
  "mistral": Family("MistralForCausalLM", windowed=True),
  "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
  "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
}
# Keys with the only values that the decoder computes.
_ONLY: dict[str, tuple[Any, ...]] = {
  "hidden_act": ("silu",),
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "use_sliding_window": (False, None),
  "quantization_config": (None,),
  "partial_rotary_factor": (1, None),
  "pretraining_tp": (1, 0, None),
}


def config_from_values(values: Mapping[str, Any], param_dtype: DtypeName) -> ModelConfig:
  """The decoder that a config.json describes.

  Raises:
    ValueError: an unknown model type, a feature that the decoder lacks, or a missing key.
  """
  family = _family(values)
  for key, allowed in _ONLY.items():
    if key in values and values[key] not in allowed:
      raise ValueError(f"config.json has {key}={values[key]!r}; only {allowed[0]!r} is supported.")
  known = {"sliding_attention"} if family.windowed else {"full_attention"}
  if other := set(values.get("layer_types") or ()) - known:
    raise ValueError(f"config.json has layer_types with {sorted(other)}; wanted are {known}.")
  width, heads = _size(values, "hidden_size"), _size(values, "num_attention_heads")
  base, scaling = _rope(values)
  window = values.get("sliding_window", 4096) if family.windowed else None
  config = ModelConfig(
    vocab_size=_required(values, "vocab_size"),
    num_layers=_required(values, "num_hidden_layers"),
    embed_dim=width,
    num_heads=heads,
    num_kv_heads=_optional(values, "num_key_value_heads", heads),
    head_dim=_optional(values, "head_dim", width // heads),
    mlp_dim=_required(values, "intermediate_size"),
    rope_base=base,
    rope_scaling=scaling,
    norm_eps=_optional(values, "rms_norm_eps", 1e-6),
    tie_embeddings=_optional(values, "tie_word_embeddings", False),
    qkv_bias=family.qkv_bias,
    qk_norm=family.qk_norm,
    attention="dense",
    dtype=param_dtype,
    param_dtype=param_dtype,
  )
  if window is None:
    return config
  return dataclasses.replace(
    config, attention="sliding_window", sliding_window=SlidingWindowConfig(window)
  )


def values_from_config(config: ModelConfig, origin: Mapping[str, Any]) -> dict[str, Any]:
  """The config.json of a decoder.

  Args:
    config: of the decoder. Attention kinds that transformers does not know are left out: there
      the model attends densely.
    origin: what is known besides: model_type, of the family that the weights came from, and
      max_position_embeddings.

  Raises:
    ValueError: no family has the decoder's features.
  """
  model_type = _model_type(config, origin.get("model_type"))
  values: dict[str, Any] = {
    "architectures": [FAMILIES[model_type].architecture],
    "model_type": model_type,
    "vocab_size": config.vocab_size,
    "num_hidden_layers": config.num_layers,
    "hidden_size": config.embed_dim,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.mlp_dim,
    "hidden_act": "silu",
    "rope_theta": config.rope_base,
    "rope_scaling": _rope_values(config.rope_scaling),
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "torch_dtype": config.param_dtype,
    "use_cache": True,
  }
  if "max_position_embeddings" in origin:
    values["max_position_embeddings"] = origin["max_position_embeddings"]
  if model_type == "mistral":
    windowed = config.attention == "sliding_window"
    values["sliding_window"] = config.sliding_window.window if windowed else None
  return values


def _family(values: Mapping[str, Any]) -> Family:
  model_type = _required(values, "model_type")
  if model_type not in FAMILIES:
    raise ValueError(
      f"config.json has model_type={model_type!r}; supported are {', '.join(FAMILIES)}."
    )
  family = FAMILIES[model_type]
  classes = values.get("architectures") or [family.architecture]
  if classes != [family.architecture]:
    raise ValueError(
      f"config.json has architectures={classes!r}; supported is [{family.architecture!r}]."
    )
  return family


def _model_type(config: ModelConfig, origin: str | None) -> str:
  """The family that the weights came from, or else the first that computes the same."""
  features = (config.qkv_bias, config.qk_norm)
  fitting = [name for name, f in FAMILIES.items() if (f.qkv_bias, f.qk_norm) == features]
  if not fitting:
    raise ValueError("No family of transformers has both qkv_bias and qk_norm.")
  if config.attention == "sliding_window":
    fitting = [name for name in fitting if FAMILIES[name].windowed]
    if not fitting:
      raise ValueError(
        "transformers has sliding windows in all layers without qkv_bias or qk_norm."
      )
  return origin if origin in fitting else fitting[0]


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
  """The base, and the stretch; newer files hold both in `rope_parameters`."""
  parameters = values.get("rope_parameters") or {}
  base = parameters.get("rope_theta", values.get("rope_theta", 10000.0))
  scaling = values.get("rope_scaling") or parameters
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  if kind == "default":
    return float(base), None
  if kind == "linear":
    return float(base), RopeScaling("linear", float(_required(scaling, "factor")))
  if kind != "llama3":
    raise ValueError(
      f"config.json has the rope type {kind!r}; supported are 'default', 'linear' and 'llama3'."
    )
  return float(base), RopeScaling(
    "llama3",
    float(_required(scaling, "factor")),
    float(_required(scaling, "low_freq_factor")),
    float(_required(scaling, "high_freq_factor")),
    int(_required(scaling, "original_max_position_embeddings")),
  )


def _rope_values(scaling: RopeScaling | None) -> dict[str, Any] | None:
  if scaling is None:
    return None
  if scaling.kind == "linear":
    return {"rope_type": "linear", "factor": scaling.factor}
  return {
    "rope_type": "llama3",
    "factor": scaling.factor,
    "low_freq_factor": scaling.low_freq_factor,
    "high_freq_factor": scaling.high_freq_factor,
    "original_max_position_embeddings": scaling.original_max_position,
  }


def _required(values: Mapping[str, Any], key: str) -> Any:
  if values.get(key) is None:
    raise ValueError(f"config.json lacks {key}.")
  return values[key]


def _size(values: Mapping[str, Any], key: str) -> int:
  value = _required(values, key)
  if not isinstance(value, int) or value < 1:
    raise ValueError(f"config.json has {key}={value!r}; it must be an integer of at least 1.")
  return value


def _optional[T](values: Mapping[str, Any], key: str, default: T) -> T:
  value = values.get(key)
  return default if value is None else value
