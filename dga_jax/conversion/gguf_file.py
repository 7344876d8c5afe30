"""GGUF files: metadata to ModelConfig, tensors dequantized and in half-split RoPE form."""

import dataclasses
from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from dga_jax.conversion import gguf_keys
from dga_jax.conversion.checkpoint_reader import common_dtype, NO_CHOICES, TokenizerChoices
from dga_jax.conversion.errors import conversion_errors, ConversionError, shown
from dga_jax.conversion.gguf_reader import GGUFContent
from dga_jax.conversion.gguf_tokenizer import origin_from_metadata, tokenizer_from_metadata
from dga_jax.conversion.known_keys import Values
from dga_jax.conversion.param_map import Naming
from dga_jax.model import ModelConfig, RopeScaling
from dga_jax.model.baselines import SlidingWindowConfig
from dga_jax.model.rope import inverse_frequencies
from dga_jax.tokenizer import Tokenizer

# The architectures, with what they add to LLaMA's layer.
_ARCHITECTURES: dict[str, dict[str, bool]] = {
  "llama": {},  # Mistral and SmolLM, too
  "qwen2": {"qkv_bias": True},
  "qwen3": {"qk_norm": True},
}
# LLaMA 3's scaling of RoPE, as divisors of the frequencies.
_ROPE_FACTORS = "rope_freqs.weight"
# Files hold only the divisors; these settings are the same in every model that has the scaling.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_INTEGERS = ("I8", "I16", "I32", "I64")


class GGUFFile:
  """One GGUF file; a `Source`.

  Args:
    path: the file; one of several parts is refused.
    ignored_keys: unknown metadata keys that change nothing in what the model computes.

  Raises:
    FileNotFoundError: there is no such file.
    ConversionError: it is no GGUF file, damaged, a part, big-endian, of another architecture, or it
      has a metadata key that is unknown or of a feature that the decoder lacks.
  """

  naming: Naming = "gguf"

  def __init__(self, path: Path, ignored_keys: Collection[str] = ()) -> None:
    self.where = str(path)
    self._content = GGUFContent(path)
    metadata = self._content.metadata
    self._architecture = Values(metadata, self.where).string("general.architecture")
    if self._architecture not in _ARCHITECTURES:
      raise ConversionError(
        f"{path} has general.architecture={shown(self._architecture)}; supported are "
        f"{', '.join(_ARCHITECTURES)}."
      )
    self._values = _below(f"{self._architecture}.", metadata, self.where)
    _check_keys(metadata, self._values, self.where, ignored_keys)

  @property
  def names(self) -> Set[str]:
    """The tensors in the file, apart from RoPE's factors, which are not weights."""
    return self._content.tensors.keys() - {_ROPE_FACTORS}

  def config(self) -> ModelConfig:
    """See `Source`. Quantized weights count as float32, the dtype of dequantized values."""
    heads = self._integer("attention.head_count")
    width = self._integer("embedding_length")
    head_dim = self._integer("attention.key_length", max(1, width // heads))
    for key in ("rope.dimension_count", "attention.value_length"):
      if self._integer(key, head_dim) != head_dim:
        raise self._values.error(key, f"{head_dim}, the width of a head")
    vocab_size = self._tokens()
    if self._integer("vocab_size", vocab_size) != vocab_size:
      raise self._values.error("vocab_size", f"{vocab_size}, the rows of token_embd.weight")
    param_dtype = common_dtype({self._dtype(name) for name in self.names if "norm" not in name})
    window = self._integer("attention.sliding_window", 0, least=0)
    with conversion_errors(self.where):
      config = ModelConfig(
        vocab_size=vocab_size,
        num_layers=self._integer("block_count"),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=self._integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_dim=self._integer("feed_forward_length"),
        rope_base=_decimal(self._values.number("rope.freq_base", 10000.0)),
        norm_eps=_decimal(self._values.number("attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in self._content.tensors,
        attention="sliding_window" if window else "dense",
        sliding_window=SlidingWindowConfig(window) if window else SlidingWindowConfig(),
        dtype=param_dtype,
        param_dtype=param_dtype,
        **_ARCHITECTURES[self._architecture],  # type: ignore[arg-type]
      )
      return dataclasses.replace(config, rope_scaling=self._rope_scaling(config))

  def tokenizer(self, choices: TokenizerChoices = NO_CHOICES) -> Tokenizer:
    """See `Source`."""
    return tokenizer_from_metadata(self._content.metadata, choices, self.where)

  def origin(self) -> Mapping[str, Any]:
    """See `Source`."""
    length = {}
    if "context_length" in self._values:
      length = {"max_position_embeddings": self._values.integer("context_length")}
    stored = origin_from_metadata(self._content.metadata, self.where)
    return {"model_type": self._architecture, **length, **stored}

  def shape(self, name: str) -> tuple[int, ...]:
    """See `Source`."""
    return self._content.tensors[name].shape

  def read(self, name: str) -> np.ndarray:
    """See `Source`."""
    kind = self._content.tensors[name].kind
    if kind.name in _INTEGERS:
      raise ConversionError(f"{self.where}: the tensor {name} holds integers ({kind.name}).")
    try:
      values = gguf.dequantize(self._content.stored(name), kind)
    except NotImplementedError as error:
      raise ConversionError(
        f"{self.where}: the tensor {name} is stored as {kind.name}, which the gguf package cannot "
        "dequantize."
      ) from error
    values = values.reshape(self.shape(name))
    if self._architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
      heads = self._integer("attention.head_count")
      if name.endswith("attn_k.weight"):
        heads = self._integer("attention.head_count_kv", heads)
      with conversion_errors(f"{self.where}: the tensor {name}"):
        values = half_split(values, heads)
    return values

  def _rope_scaling(self, config: ModelConfig) -> RopeScaling | None:
    """The scaling of RoPE. As in llama.cpp, a factor without a type is linear, and 0 is none."""
    kind = self._values.string("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
      raise ConversionError(
        f"{self.where} has the rope type {shown(kind)}; supported are 'none', 'linear' and LLaMA "
        f"3's {_ROPE_FACTORS}."
      )
    old = self._values.number("rope.scale_linear", 0.0)
    factor = self._values.number("rope.scaling.factor", old) if kind == "linear" else 0.0
    linear = None if factor in (0.0, 1.0) else RopeScaling("linear", _decimal(factor))
    if _ROPE_FACTORS not in self._content.tensors:
      return linear
    if linear is not None:
      raise ConversionError(
        f"{self.where} has both a linear scaling of RoPE and {_ROPE_FACTORS}; only one of them is "
        "supported."
      )
    return self._llama3_scaling(config)

  def _llama3_scaling(self, config: ModelConfig) -> RopeScaling:
    """LLaMA 3's settings, whose divisors are compared with those in the file."""
    pairs = config.head_dim // 2
    if self.shape(_ROPE_FACTORS) != (pairs,):
      raise ConversionError(
        f"{self.where}: the tensor {_ROPE_FACTORS} is {list(self.shape(_ROPE_FACTORS))}; it must "
        f"be [{pairs}]."
      )
    factors_C = np.asarray(self.read(_ROPE_FACTORS), np.float64)
    problem = f"{self.where}: the tensor {_ROPE_FACTORS} does not hold LLaMA 3's scaling of RoPE."
    if not (np.isfinite(factors_C).all() and factors_C.max() >= 1):
      raise ConversionError(problem)
    scaling = RopeScaling("llama3", float(factors_C.max()), **_LLAMA3_ROPE)  # type: ignore[arg-type]
    plain_C, scaled_C = (
      inverse_frequencies(config.head_dim, base=config.rope_base, scaling=s)
      for s in (None, scaling)
    )
    if not np.allclose(plain_C / scaled_C, factors_C, rtol=1e-4):
      raise ConversionError(problem)
    return scaling

  def _integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
    """An integer, or the one integer in an array with an entry for each layer."""
    value = self._values[key]
    if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
      one = Values({key: value[0].item()}, self.where, self._values.prefix)
      return one.integer(key, least=least)
    if isinstance(value, np.ndarray):
      raise self._values.error(key, "a number, or the same number for each layer")
    return self._values.integer(key, default, least=least)

  def _tokens(self) -> int:
    """V, the rows of the embedding: metadata may count only the tokens that have a text."""
    if "token_embd.weight" not in self._content.tensors:
      raise ConversionError(f"{self.where} lacks the tensor token_embd.weight.")
    return self.shape("token_embd.weight")[0]

  def _dtype(self, name: str) -> str:
    return _DTYPES.get(self._content.tensors[name].kind.name, "float32")


def half_split(weights: np.ndarray, heads: int) -> np.ndarray:
  """Rows of a query or key matrix for rotating channel c with c + D/2.

  GGUF files of the llama architecture hold them for rotating 2c with 2c + 1.
  """
  rows, columns = weights.shape
  pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
  return pairs.swapaxes(1, 2).reshape(rows, columns)


def _below(prefix: str, metadata: Mapping[str, Any], where: str) -> Values:
  """The metadata in a namespace, by keys without it."""
  inside = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
  return Values(inside, where, prefix)


def _check_keys(
  metadata: Mapping[str, Any], architecture: Values, where: str, ignored_keys: Collection[str]
) -> None:
  """Refuses unknown keys, and those of features that the decoder or the tokenizers lack."""
  if other := [key for key in metadata if key.startswith(gguf_keys.OTHER_KINDS)]:
    raise ConversionError(f"{where} has the key {shown(other[0])}, which is none of a model.")
  table = gguf_keys.GENERAL
  known = {key: metadata[key] for key in metadata if key in table.fixed or key.startswith("split.")}
  table.check(Values(known, where), ignored_keys)
  gguf_keys.ARCHITECTURE.check(architecture, ignored_keys)
  tokenizer = _below("tokenizer.", metadata, where)
  named = {key for key in tokenizer if key.startswith(gguf_keys.NAMED_TEMPLATE)}
  gguf_keys.TOKENIZER.check(tokenizer, {*ignored_keys, *named})


def _decimal(value: float) -> float:
  """The decimal that a float32 was made of: 9.9999997e-06 is 1e-05."""
  with np.errstate(over="ignore"):
    return float(str(np.float32(value)))
