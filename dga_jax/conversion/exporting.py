"""A checkpoint of this project to a folder that transformers loads."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tqdm import tqdm

from dga_jax.checkpoint import load_config, load_model
from dga_jax.conversion.hugging_face import HEAD_BUDGETS
from dga_jax.conversion.origin import chat_templates, json_files
from dga_jax.conversion.param_map import model_specs, selector_specs, TensorSpec
from dga_jax.conversion.safetensors_files import INDEX, SELECTOR, SINGLE
from dga_jax.conversion.template import json_with_start_tokens
from dga_jax.model import ModelConfig
from dga_jax.tokenizer import FILE_NAME

# Bytes of one file; a larger model gets several, and an index.
SHARD_BYTES = 2_000_000_000


def export_hugging_face(
  workdir: str | Path,
  folder: Path,
  *,
  step: int | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes safetensors in the stored dtype, the JSON files, the tokenizer and chat templates.

  Head budgets of the model are written to `head_budgets.json`, and the weights of its fitted
  selector to `focal_selector.safetensors`. Other programs ignore these files and an import reads
  them. Both are for the order of heads in the safetensors.

  The files are written to a new folder beside `folder`, which is renamed when all of them are on
  the disk. So an export that fails or is killed leaves no folder of that name; one that fails
  removes its unfinished folder, and one that is killed leaves it as `.NAME.*.partial`.

  Args:
    workdir: the folder of the checkpoint, a run's or an import's.
    folder: to be made.
    step: which checkpoint; None for the newest.
    shard_bytes: bound on the tensors' bytes in one file.

  Raises:
    CheckpointError: there is no such checkpoint, or it is damaged.
    ValueError: `folder` exists, transformers has no such model, or the model has gates.
    OSError: the files could not be written.
  """
  if os.path.lexists(folder):
    raise ValueError(f"{folder} exists; name a folder to be made.")
  model, config, tokenizer = load_model(workdir, step)
  if config.head_gates:
    raise ValueError(
      f"the model in {workdir} has a gate for each KV head, which no export holds. Export the "
      "model that the gates were trained for (config.init_from)."
    )
  origin = _origin(load_config(workdir, step))
  files, templates = json_files(config, origin, tokenizer), chat_templates(origin)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  with _new_folder(folder) as partial:
    _write_tensors(partial, config, params, shard_bytes)
    if selector := dict(_stored_tensors(selector_specs(config), config, params)):
      _save(partial / SELECTOR, selector)
    for name, values in files.items():
      _write_json(partial / name, values)
    _write_text(partial / FILE_NAME, json_with_start_tokens(tokenizer))
    for name, text in templates.items():
      _write_text(partial / name, text)
    if config.head_budgets is not None:
      _write_text(partial / HEAD_BUDGETS, config.head_budgets.to_json())


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
  """A new folder beside `folder`, which gets its name at the end, or is removed after an error."""
  folder = folder.absolute()
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
  try:
    partial.chmod(0o777 & ~_umask())  # mkdtemp makes a folder that only its owner can read.
    yield partial
    _to_disk(partial)
    partial.rename(folder)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  _sync(folder.parent)


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask


def _to_disk(folder: Path) -> None:
  """Waits until everything in a folder is on the disk."""
  for path in folder.rglob("*"):
    _sync(path)
  _sync(folder)


def _sync(path: Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _origin(saved: Mapping[str, Any]) -> Mapping[str, Any]:
  """What an import stored; of a model trained here, the length of its training rows."""
  if "origin" in saved:
    return saved["origin"]
  return {"max_position_embeddings": saved["data"]["sequence_length"]}


def _write_tensors(
  folder: Path, config: ModelConfig, params: Mapping[str, Any], shard_bytes: int
) -> None:
  shards = _shards(config, shard_bytes)
  tensors = _stored_tensors(model_specs(config), config, params)
  file_of: dict[str, str] = {}
  with tqdm(total=sum(map(len, shards)), desc="writing", unit="tensor", disable=None) as progress:
    for number, names in enumerate(shards, start=1):
      file = f"model-{number:05}-of-{len(shards):05}.safetensors"
      file = SINGLE if len(shards) == 1 else file
      content = dict(next(tensors) for _ in names)
      _save(folder / file, content)
      file_of |= dict.fromkeys(content, file)
      progress.update(len(names))
  if len(shards) > 1:
    metadata = {"total_size": _total_bytes(config)}
    _write_json(folder / INDEX, {"metadata": metadata, "weight_map": file_of})


def _save(path: Path, content: dict[str, np.ndarray]) -> None:
  try:
    save_file(content, path, metadata={"format": "pt"})
  except SafetensorError as error:  # What the library makes of a full disk.
    raise OSError(f"{path} could not be written: {error}") from error


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
  for spec in model_specs(config):
    count = int(np.prod(spec.stored_shape(config))) * itemsize
    layers: Any = range(config.num_layers) if spec.in_layers else [None]
    yield from ((spec.name("hugging_face", layer), count) for layer in layers)


def _total_bytes(config: ModelConfig) -> int:
  return sum(count for _, count in _tensor_bytes(config))


def _stored_tensors(
  specs: Sequence[TensorSpec], config: ModelConfig, params: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
  for spec in specs:
    value: Any = params
    for key in spec.path:
      value = value[key]
    if not spec.in_layers:
      yield spec.name("hugging_face"), spec.to_stored(np.asarray(value), config)
      continue
    for layer in range(config.num_layers):
      name = spec.name("hugging_face", layer)
      yield name, spec.to_stored(np.asarray(value[layer]), config)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
  _write_text(path, json.dumps(values, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
  path.parent.mkdir(exist_ok=True)
  path.write_text(text, encoding="utf-8")
