"""Hugging Face folders: config.json, the tokenizer's files, and safetensors."""

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from dga_jax.conversion.checkpoint_reader import common_dtype
from dga_jax.conversion.hugging_face_config import config_from_values
from dga_jax.conversion.param_map import Naming
from dga_jax.conversion.safetensors_files import SafetensorsFiles
from dga_jax.model import ModelConfig
from dga_jax.tokenizer import FILE_NAME, Tokenizer


class HuggingFaceFolder:
  """A folder that transformers saves and loads; a `Source`.

  Args:
    folder: with config.json, tokenizer.json and safetensors.

  Raises:
    FileNotFoundError: config.json or the weights are missing.
    ValueError: a file is damaged.
  """

  naming: Naming = "hugging_face"

  def __init__(self, folder: Path) -> None:
    self._folder = folder
    self._values = _read_json(folder / "config.json")
    self._tensors = SafetensorsFiles(folder)

  @property
  def names(self) -> Set[str]:
    """The tensors in the files, without buffers of RoPE that old files hold."""
    return {name for name in self._tensors.names if not name.endswith(".rotary_emb.inv_freq")}

  def config(self) -> ModelConfig:
    """See `Source`."""
    dtypes = {self._tensors.dtype(name) for name in self.names}
    return config_from_values(self._values, common_dtype(dtypes))

  def tokenizer(self, end_token: str | None) -> Tokenizer:
    """See `Source`."""
    path = self._folder / FILE_NAME
    if not path.is_file():
      raise FileNotFoundError(
        f"There is no {path}. transformers writes one: "
        f"AutoTokenizer.from_pretrained({str(self._folder)!r}).save_pretrained(...)"
      )
    try:
      backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises plain Exception.
      raise ValueError(f"{path} is damaged: {error}") from error
    return Tokenizer.imported(backend, end_token or self._end_token(backend))

  def origin(self) -> Mapping[str, Any]:
    """See `Source`."""
    wanted = ("model_type", "max_position_embeddings")
    return {key: self._values[key] for key in wanted if key in self._values}

  def shape(self, name: str) -> tuple[int, ...]:
    """See `Source`."""
    return self._tensors.shape(name)

  def read(self, name: str) -> np.ndarray:
    """See `Source`."""
    return self._tensors.read(name)

  def _end_token(self, backend: tokenizers.Tokenizer) -> str:
    """The end of a turn or text: tokenizer_config.json knows it best, then config.json."""
    path = self._folder / "tokenizer_config.json"
    token = _read_json(path).get("eos_token") if path.is_file() else None
    if isinstance(token, Mapping):
      token = token.get("content")
    if token is None:
      ids = self._values.get("eos_token_id")
      first = ids[0] if isinstance(ids, list) else ids
      token = None if first is None else backend.id_to_token(first)
    if token is None:
      raise ValueError(
        f"Neither tokenizer_config.json nor config.json in {self._folder} names a token that ends "
        "a text; give one with --end_token."
      )
    return token


def _read_json(path: Path) -> dict[str, Any]:
  if not path.is_file():
    raise FileNotFoundError(f"There is no {path}.")
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is damaged: {error}") from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} holds a {type(values).__name__}; it must be an object.")
  return values
