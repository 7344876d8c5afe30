"""Hugging Face folders: config.json, the tokenizer's files, and safetensors."""

import dataclasses
from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from dga_jax.conversion.checkpoint_reader import common_dtype, NO_CHOICES, TokenizerChoices
from dga_jax.conversion.errors import conversion_errors
from dga_jax.conversion.hugging_face_config import config_from_values
from dga_jax.conversion.hugging_face_files import CONFIG, FolderFiles
from dga_jax.conversion.hugging_face_tokenizer import read_tokenizer
from dga_jax.conversion.json_files import read_json
from dga_jax.conversion.param_map import Naming
from dga_jax.conversion.safetensors_files import SafetensorsFiles
from dga_jax.head_budgets import HeadBudgets
from dga_jax.model import ModelConfig
from dga_jax.tokenizer import Tokenizer

HEAD_BUDGETS = "head_budgets.json"  # `HeadBudgets`, for the order of heads in the safetensors.


class HuggingFaceFolder:
  """A folder that transformers saves and loads; a `Source`.

  Args:
    folder: with config.json, tokenizer.json and safetensors.
    ignored_keys: unknown keys of config.json that change nothing in what the model computes.

  Raises:
    FileNotFoundError: config.json or the weights are missing.
    ConversionError: a file is damaged.
  """

  naming: Naming = "hugging_face"

  def __init__(self, folder: Path, ignored_keys: Collection[str] = ()) -> None:
    self.where = str(folder)
    self._ignored_keys = ignored_keys
    self._files = FolderFiles(folder)
    self._tensors = SafetensorsFiles(folder)

  @property
  def names(self) -> Set[str]:
    """The tensors in the files, without the RoPE frequencies that old files hold as buffers."""
    return {name for name in self._tensors.names if not name.endswith(".rotary_emb.inv_freq")}

  def config(self) -> ModelConfig:
    """See `Source`.

    An export of this project may have written head budgets and weights of the fitted selector.
    """
    dtypes = {self._tensors.dtype(name) for name in self.names}
    config = config_from_values(
      self._files.config,
      common_dtype(dtypes),
      where=str(self._files.folder / CONFIG),
      ignored_keys=self._ignored_keys,
    )
    config = dataclasses.replace(config, focal_selector=self._tensors.has_selector)
    path = self._files.folder / HEAD_BUDGETS
    if not path.is_file():
      return config
    with conversion_errors(path):
      budgets = HeadBudgets.from_dict(read_json(path))
      return dataclasses.replace(config, attention="head_budgets", head_budgets=budgets)

  def tokenizer(self, choices: TokenizerChoices = NO_CHOICES) -> Tokenizer:
    """See `Source`."""
    return read_tokenizer(self._files, choices)

  def origin(self) -> Mapping[str, Any]:
    """See `Source`."""
    return self._files.origin()

  def shape(self, name: str) -> tuple[int, ...]:
    """See `Source`."""
    return self._tensors.shape(name)

  def read(self, name: str) -> np.ndarray:
    """See `Source`."""
    return self._tensors.read(name)
