"""Copies of the golden Hugging Face folders that tests change and import."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from dga_jax.conversion.checkpoint_reader import NO_CHOICES, TokenizerChoices
from dga_jax.conversion.hugging_face import HuggingFaceFolder
from dga_jax.conversion.importing import import_model

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "hugging_face"
FAMILIES = ["llama2", "llama3", "mistral", "qwen2", "qwen3", "smollm"]


def copy_of(family: str, parent: Path) -> Path:
  """Copies a golden folder; returns the copy."""
  return Path(shutil.copytree(GOLDEN / family, parent / family))


def import_folder(
  folder: Path, workdir: Path, *, choices: TokenizerChoices = NO_CHOICES, **changes: Any
) -> str:
  """Imports a folder with changed fields of the model's config."""
  source = HuggingFaceFolder(folder)
  config = dataclasses.replace(source.config(), **changes)
  return import_model(source, config, workdir, choices=choices)


def tensors(folder: Path) -> dict[str, np.ndarray]:
  """All tensors of a folder, by name."""
  return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
  """Changes the object in a JSON file in place. A missing file counts as an empty object."""
  values = json.loads(path.read_text()) if path.exists() else {}
  change(values)
  path.write_text(json.dumps(values))
  return path


def set_keys(path: Path, **values: Any) -> Path:
  """Sets keys of the object in a JSON file."""
  return change_json(path, lambda stored: stored.update(values))
