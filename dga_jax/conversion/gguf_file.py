"""GGUF files: metadata to ModelConfig, tensors dequantized and back in half-split RoPE form."""

import dataclasses
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from dga_jax.conversion.checkpoint_reader import common_dtype
from dga_jax.conversion.gguf_tokenizer import tokenizer_from_metadata
from dga_jax.conversion.param_map import Naming
from dga_jax.model import ModelConfig, RopeScaling
from dga_jax.model.attention_kinds.sliding_window import SlidingWindowConfig
from dga_jax.model.rope import inverse_frequencies
from dga_jax.tokenizer import Tokenizer

# The architectures, with what they add to LLaMA's layer.
_ARCHITECTURES: dict[str, dict[str, bool]] = {
  "llama": {},  # Mistral and SmolLM, too
  "qwen2": {"qkv_bias": True},
  "qwen3": {"qk_norm": True},
}
# LLaMA 3's stretch of RoPE, as divisors of the frequencies.
_ROPE_FACTORS = "rope_freqs.weight"
# The same in every model that has it, so files hold only what comes of it.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class GGUFFile:
  """One GGUF file; a `Source`.

  Args:
    path: the file; one of several parts is refused.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no GGUF file, a damaged one, or a part.
  """

  naming: Naming = "gguf"

  def __init__(self, path: Path) -> None:
    self._path = path
    reader = _read(path)
    self._metadata: dict[str, Any] = {k: f.contents() for k, f in reader.fields.items()}
    if self._metadata.get("split.count", 1) > 1:
      raise ValueError(f"{path} is one of {self._metadata['split.count']} parts; join them first.")
    self._tensors = {tensor.name: tensor for tensor in reader.tensors}
    self._architecture = str(self._metadata.get("general.architecture"))
    if self._architecture not in _ARCHITECTURES:
      raise ValueError(
        f"{path} has general.architecture={self._architecture!r}; supported are "
        f"{', '.join(_ARCHITECTURES)}."
      )

  @property
  def names(self) -> Set[str]:
    """The tensors in the file, apart from RoPE's factors, which are not weights."""
    return self._tensors.keys() - {_ROPE_FACTORS}

  def config(self) -> ModelConfig:
    """See `Source`. Quantized weights count as float32, which dequantizing gives."""
    heads = self._get("attention.head_count")
    head_dim = self._get("attention.key_length", self._get("embedding_length") // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
      if self._get(key, head_dim) != head_dim:
        raise ValueError(f"{self._path} has {key}={self._get(key)}; only {head_dim} is supported.")
    param_dtype = common_dtype({self._dtype(name) for name in self.names if "norm" not in name})
    config = ModelConfig(
      vocab_size=self._tokens(),
      num_layers=self._get("block_count"),
      embed_dim=self._get("embedding_length"),
      num_heads=heads,
      num_kv_heads=self._get("attention.head_count_kv", heads),
      head_dim=head_dim,
      mlp_dim=self._get("feed_forward_length"),
      rope_base=_decimal(self._get("rope.freq_base", 10000.0)),
      norm_eps=_decimal(self._get("attention.layer_norm_rms_epsilon")),
      tie_embeddings="output.weight" not in self._tensors,
      attention="dense",
      dtype=param_dtype,
      param_dtype=param_dtype,
      **_ARCHITECTURES[self._architecture],  # type: ignore[arg-type]
    )
    config = dataclasses.replace(config, rope_scaling=self._rope_scaling(config))
    if window := self._get("attention.sliding_window", 0):
      window_config = SlidingWindowConfig(window)
      config = dataclasses.replace(config, attention="sliding_window", sliding_window=window_config)
    return config

  def tokenizer(self, end_token: str | None) -> Tokenizer:
    """See `Source`."""
    return tokenizer_from_metadata(self._metadata, end_token)

  def origin(self) -> Mapping[str, Any]:
    """See `Source`."""
    length = self._get("context_length", None)
    known = {} if length is None else {"max_position_embeddings": int(length)}
    return {"model_type": self._architecture, **known}

  def shape(self, name: str) -> tuple[int, ...]:
    """See `Source`."""
    return tuple(int(size) for size in reversed(self._tensors[name].shape))

  def read(self, name: str) -> np.ndarray:
    """See `Source`."""
    tensor = self._tensors[name]
    try:
      values = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      raise ValueError(
        f"The tensor {name} is quantized as {tensor.tensor_type.name}, which gguf cannot undo."
      ) from error
    values = values.reshape(self.shape(name))
    if self._architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
      kind = "head_count" if name.endswith("attn_q.weight") else "head_count_kv"
      values = half_split(values, self._get(f"attention.{kind}", self._get("attention.head_count")))
    return values

  def _rope_scaling(self, config: ModelConfig) -> RopeScaling | None:
    kind = self._get("rope.scaling.type", "none")
    if kind == "linear":
      return RopeScaling("linear", float(self._get("rope.scaling.factor")))
    if kind != "none":
      raise ValueError(
        f"{self._path} has the rope type {kind!r}; supported are 'none', 'linear' and LLaMA 3's "
        f"{_ROPE_FACTORS}."
      )
    if _ROPE_FACTORS not in self._tensors:
      return None
    factors_C = np.asarray(self.read(_ROPE_FACTORS), np.float64)
    scaling = RopeScaling("llama3", float(factors_C.max()), **_LLAMA3_ROPE)  # type: ignore[arg-type]
    plain_C, scaled_C = (
      inverse_frequencies(config.head_dim, base=config.rope_base, scaling=s)
      for s in (None, scaling)
    )
    if factors_C.shape != plain_C.shape or not np.allclose(
      plain_C / scaled_C, factors_C, rtol=1e-4
    ):
      raise ValueError(f"The tensor {_ROPE_FACTORS} does not hold LLaMA 3's scaling of RoPE.")
    return scaling

  def _get(self, key: str, *default: Any) -> Any:
    value = self._metadata.get(f"{self._architecture}.{key}", *default)
    if value is None and not default:
      raise ValueError(f"{self._path} lacks {self._architecture}.{key} in its metadata.")
    if isinstance(value, list):
      raise ValueError(f"{self._path} has {key} for each layer; all layers must be the same.")
    return value

  def _tokens(self) -> int:
    """V, read off the embedding: metadata may count only the tokens that have a text."""
    if "token_embd.weight" not in self._tensors:
      raise ValueError(f"{self._path} lacks the tensor token_embd.weight.")
    return self.shape("token_embd.weight")[0]

  def _dtype(self, name: str) -> str:
    return _FLOATS.get(self._tensors[name].tensor_type.name, "float32")


def half_split(weights: np.ndarray, heads: int) -> np.ndarray:
  """Rows of a query or key matrix for rotating channel c with c + D/2.

  GGUF files of the llama architecture hold them for rotating 2c with 2c + 1.
  """
  rows, columns = weights.shape
  pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
  return pairs.swapaxes(1, 2).reshape(rows, columns)


class _Reader(gguf.GGUFReader):
  """The library's reader, which says of a file that is too short which tensor it lacks."""

  def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
    try:
      super()._build_tensors(start_offs, fields)
    except ValueError as error:
      # Tensors lie in the order of their offsets, the last of a field's parts.
      behind = [field.name for field in fields if start_offs + field.parts[-1][0] >= len(self.data)]
      last = max(fields, key=lambda field: field.parts[-1][0]).name
      raise ValueError(f"it ends before its tensor {(behind or [last])[0]} does") from error


def _read(path: Path) -> gguf.GGUFReader:
  if not path.is_file():
    raise FileNotFoundError(f"There is no {path}.")
  try:
    return _Reader(path)
  except (ValueError, IndexError, KeyError, OverflowError) as error:
    raise ValueError(f"{path} is no whole GGUF file: {error}.") from error


def _decimal(value: float) -> float:
  """The decimal that was meant by a float32: 9.9999997e-06 is 1e-05."""
  return float(str(np.float32(value)))
