"""A checkpoint of ours to a folder that transformers loads."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from tqdm import tqdm

from dga_jax.checkpoint import load_config, load_model
from dga_jax.conversion.hugging_face_config import values_from_config
from dga_jax.conversion.param_map import tensor_specs
from dga_jax.model import ModelConfig
from dga_jax.tokenizer import FILE_NAME, Tokenizer

# Bytes of one file; a larger model gets several, and an index.
SHARD_BYTES = 2_000_000_000


def export_hugging_face(
  workdir: str | Path,
  folder: Path,
  *,
  step: int | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes safetensors in the stored dtype, config.json and the tokenizer; all or nothing.

  Args:
    workdir: of the checkpoint, a run's or an import's.
    folder: to be made; it gets its name when everything in it is written.
    step: which checkpoint; None for the newest.
    shard_bytes: bound on the tensors' bytes in one file.

  Raises:
    CheckpointError: there is no such checkpoint, or a damaged one.
    ValueError: `folder` is there already, or transformers has no such model.
  """
  if folder.exists():
    raise ValueError(f"{folder} is there already; name a folder to be made.")
  model, config, tokenizer = load_model(workdir, step)
  values = values_from_config(config, _origin(load_config(workdir, step)))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  partial = folder.with_name(f"{folder.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  _write_tensors(partial, config, params, shard_bytes)
  _write_json(partial / "config.json", values | _token_ids(tokenizer))
  (partial / FILE_NAME).write_text(tokenizer.to_plain_json(), encoding="utf-8")
  _write_json(partial / "tokenizer_config.json", _tokenizer_values(tokenizer, values))
  partial.rename(folder)


def _origin(saved: Mapping[str, Any]) -> Mapping[str, Any]:
  """What an import knew, or for a model trained here the length of its training rows."""
  if "origin" in saved:
    return saved["origin"]
  return {"max_position_embeddings": saved["data"]["sequence_length"]}


def _write_tensors(
  folder: Path, config: ModelConfig, params: Mapping[str, Any], shard_bytes: int
) -> None:
  shards = _shards(config, shard_bytes)
  tensors = _stored_tensors(config, params)
  place: dict[str, str] = {}
  with tqdm(total=sum(map(len, shards)), desc="writing", unit="tensor", disable=None) as progress:
    for number, names in enumerate(shards, start=1):
      file = f"model-{number:05}-of-{len(shards):05}.safetensors"
      file = "model.safetensors" if len(shards) == 1 else file
      content = dict(next(tensors) for _ in names)
      save_file(content, folder / file, metadata={"format": "pt"})
      place |= dict.fromkeys(content, file)
      progress.update(len(names))
  if len(shards) > 1:
    metadata = {"total_size": _total_bytes(config)}
    _write_json(
      folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": place}
    )


def _shards(config: ModelConfig, shard_bytes: int) -> list[list[str]]:
  """The names of the tensors of each file, in the order of `_stored_tensors`."""
  shards: list[list[str]] = [[]]
  size = 0
  for name, count in _tensor_bytes(config):
    if shards[-1] and size + count > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += count
  return shards


def _tensor_bytes(config: ModelConfig) -> Iterator[tuple[str, int]]:
  itemsize = jnp.dtype(config.param_dtype).itemsize
  for spec in tensor_specs(config):
    count = int(np.prod(spec.stored_shape(config))) * itemsize
    layers: Any = range(config.num_layers) if spec.in_layers else [None]
    yield from ((spec.name("hugging_face", layer), count) for layer in layers)


def _total_bytes(config: ModelConfig) -> int:
  return sum(count for _, count in _tensor_bytes(config))


def _stored_tensors(
  config: ModelConfig, params: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
  for spec in tensor_specs(config):
    value: Any = params
    for key in spec.path:
      value = value[key]
    if not spec.in_layers:
      yield spec.name("hugging_face"), spec.to_stored(np.asarray(value), config)
      continue
    for layer in range(config.num_layers):
      name = spec.name("hugging_face", layer)
      yield name, spec.to_stored(np.asarray(value[layer]), config)


def _token_ids(tokenizer: Tokenizer) -> dict[str, int]:
  start = {"bos_token_id": tokenizer.start_ids[0]} if tokenizer.start_ids else {}
  return {"eos_token_id": tokenizer.end_id} | start


def _tokenizer_values(tokenizer: Tokenizer, values: Mapping[str, Any]) -> dict[str, Any]:
  plain: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": tokenizer.end_token,
    "clean_up_tokenization_spaces": False,
  }
  if "max_position_embeddings" in values:
    plain["model_max_length"] = values["max_position_embeddings"]
  return plain


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
