"""Hugging Face's config.json of the LLaMA family, to ModelConfig and back."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal

from dga_jax.conversion.errors import conversion_errors, ConversionError, shown
from dga_jax.conversion.hugging_face_keys import CONFIG
from dga_jax.conversion.hugging_face_rope import read_rope, rope_scaling_values
from dga_jax.conversion.known_keys import KnownKeys, Values
from dga_jax.model import ModelConfig
from dga_jax.model.baselines import SlidingWindowConfig
from dga_jax.model.config import DtypeName


@dataclasses.dataclass(frozen=True)
class Family:
  """The features and defaults of a `model_type`.

  Attributes:
    architectures: the class of transformers; its older names follow.
    qkv_bias: as in ModelConfig.
    qk_norm: as in ModelConfig.
    window: where the layers have sliding windows: "none" has none, "all" has the window
      `sliding_window` in all of them, and "layer_types" chooses by `use_sliding_window`,
      `max_window_layers` and `layer_types`.
    head_dim: its default; None for hidden_size // num_attention_heads.
    num_kv_heads: the default of `num_key_value_heads`; None for num_attention_heads.
    ignores: keys that transformers does not read for this family.
  """

  architectures: tuple[str, ...]
  qkv_bias: bool = False
  qk_norm: bool = False
  window: Literal["none", "all", "layer_types"] = "none"
  head_dim: int | None = None
  num_kv_heads: int | None = None
  ignores: frozenset[str] = frozenset()

  @property
  def keys(self) -> KnownKeys:
    """The table of the keys in a config.json of this family."""
    fixed = {key: allowed for key, allowed in CONFIG.fixed.items() if key not in self.ignores}
    return KnownKeys(CONFIG.read, CONFIG.unused | self.ignores, fixed)


FAMILIES = {
  # SmolLM, too. The older name is that of the first conversions of LLaMA 1.
  "llama": Family(("LlamaForCausalLM", "LLaMAForCausalLM")),
  "mistral": Family(("MistralForCausalLM",), window="all", num_kv_heads=8),
  "qwen2": Family(
    ("Qwen2ForCausalLM",),
    qkv_bias=True,
    window="layer_types",
    num_kv_heads=32,
    ignores=frozenset({"attention_bias"}),
  ),
  "qwen3": Family(
    ("Qwen3ForCausalLM",), qk_norm=True, window="layer_types", head_dim=128, num_kv_heads=32
  ),
}
_DEFAULT_WINDOW = 4096
_FULL, _SLIDING = "full_attention", "sliding_attention"


def config_from_values(
  values: Mapping[str, Any],
  param_dtype: DtypeName,
  *,
  where: str = "config.json",
  ignored_keys: Collection[str] = (),
) -> ModelConfig:
  """The decoder of a config.json.

  Args:
    values: of the file. A null counts as an absent key.
    param_dtype: of the stored weights.
    where: names the file in messages.
    ignored_keys: keys that are not in the table of known keys, and that the user says change
      nothing.

  Raises:
    ConversionError: an unknown model type, a feature that the decoder lacks, an unknown key, a
      missing key, or a value of another type than the key's.
  """
  checked = Values(values, where)
  family = _family(checked)
  family.keys.check(checked, ignored_keys)
  width, heads = checked.integer("hidden_size"), checked.integer("num_attention_heads")
  layers = checked.integer("num_hidden_layers")
  window = _window(checked, family, layers)
  base, scaling = read_rope(checked, _FULL if window is None else _SLIDING, ignored_keys)
  default_kv_heads = family.num_kv_heads if checked.absent("num_key_value_heads") else heads
  with conversion_errors(where):
    config = ModelConfig(
      vocab_size=checked.integer("vocab_size"),
      num_layers=layers,
      embed_dim=width,
      num_heads=heads,
      num_kv_heads=checked.integer("num_key_value_heads", default_kv_heads or heads),
      head_dim=checked.integer("head_dim", family.head_dim or max(1, width // heads)),
      mlp_dim=checked.integer("intermediate_size"),
      rope_base=base,
      rope_scaling=scaling,
      norm_eps=checked.number("rms_norm_eps", 1e-6),
      tie_embeddings=checked.boolean("tie_word_embeddings", False),
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
    config: of the decoder. An attention kind that transformers does not have is left out: the
      exported model attends densely.
    origin: what an import stored; `model_type` is the family of the weights, and
      `max_position_embeddings` the trained context length.

  Raises:
    ValueError: no family has the decoder's features.
  """
  model_type = _model_type(config, origin.get("model_type"))
  values: dict[str, Any] = {
    "architectures": [FAMILIES[model_type].architectures[0]],
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
    "rope_scaling": rope_scaling_values(config.rope_scaling),
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "torch_dtype": config.param_dtype,
  }
  if "max_position_embeddings" in origin:
    values["max_position_embeddings"] = origin["max_position_embeddings"]
  return values | _window_values(config, FAMILIES[model_type])


def _family(values: Values) -> Family:
  model_type = values.string("model_type")
  if model_type not in FAMILIES:
    raise ConversionError(
      f"{values.where} has model_type={shown(model_type)}; supported are {', '.join(FAMILIES)}."
    )
  family = FAMILIES[model_type]
  classes = values["architectures"]
  if classes and classes not in [[name] for name in family.architectures]:
    raise ConversionError(
      f"{values.where} has architectures={shown(classes)}; supported is "
      f"[{family.architectures[0]!r}]."
    )
  return family


def _window(values: Values, family: Family, layers: int) -> int | None:
  """The sliding window of all layers, None where all layers attend to the whole context."""
  if family.window == "layer_types":
    has_window = values.boolean("use_sliding_window", False)
  elif values.boolean("use_sliding_window", False):
    raise values.error("use_sliding_window", "false for this model_type")
  elif family.window == "none" and "sliding_window" in values:
    raise values.error("sliding_window", "null for this model_type")
  else:
    has_window = family.window == "all"
  # Here a null differs from an absent key: it says that there is no window.
  if not has_window or ("sliding_window" not in values and not values.absent("sliding_window")):
    window = None
  else:
    window = values.integer("sliding_window", _DEFAULT_WINDOW)
  types = _layer_types(values, family, layers, window)
  if len(types) > 1:
    raise ConversionError(
      f"{values.where} has layers with a sliding window and layers without one; all must be of one "
      "kind."
    )
  return window if types == {_SLIDING} else None


def _layer_types(values: Values, family: Family, layers: int, window: int | None) -> set[str]:
  """The types of the layers, from `layer_types` or the keys that it replaces."""
  first = values.integer("max_window_layers", 28, least=0) if family.window == "layer_types" else 0
  by_default = {_FULL} if window is None or first > 0 else set()
  by_default |= {_SLIDING} if window is not None and first < layers else set()
  stored = values["layer_types"]
  if stored is None:
    return by_default
  if not isinstance(stored, list) or len(stored) != layers:
    raise values.error("layer_types", f"a list of {layers} types, one for each layer")
  allowed = {_FULL, _SLIDING} if family.window == "layer_types" and window else by_default
  if other := [name for name in stored if not isinstance(name, str) or name not in allowed]:
    raise ConversionError(
      f"{values.where} has {shown(other[0])} in layer_types; by its other keys the layers are "
      f"{' or '.join(sorted(allowed))}."
    )
  return set(stored)


def _window_values(config: ModelConfig, family: Family) -> dict[str, Any]:
  """The keys of a config.json that say which layers have a sliding window."""
  window = config.sliding_window.window if config.attention == "sliding_window" else None
  if family.window == "all":
    return {"sliding_window": window}
  if window is None:
    return {}
  return {
    "use_sliding_window": True,
    "sliding_window": window,
    "max_window_layers": 0,
    "layer_types": [_SLIDING] * config.num_layers,
  }


def _model_type(config: ModelConfig, origin: str | None) -> str:
  """The family of the weights, or else the first that computes the same."""
  features = (config.qkv_bias, config.qk_norm)
  fitting = [name for name, f in FAMILIES.items() if (f.qkv_bias, f.qk_norm) == features]
  if not fitting:
    raise ValueError("No family of transformers has both qkv_bias and qk_norm.")
  if config.attention == "sliding_window":
    fitting = [name for name in fitting if FAMILIES[name].window != "none"]
  return origin if origin in fitting else fitting[0]
