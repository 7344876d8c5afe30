"""Imports models of the LLaMA family from Hugging Face folders and GGUF files, and exports them.

  python -m dga_jax.convert --source=DIR_OR_FILE.gguf --workdir=runs/imported
  python -m dga_jax.generate --workdir=runs/imported --prompt="The capital of France is"
  python -m dga_jax.convert --workdir=runs/imported --to_hf=exported

LLaMA 2 and 3, Mistral, Qwen 2.5, Qwen 3, SmolLM. The tokenizer comes along. An imported model
attends as it did (densely, or Mistral by its window) unless --attention says otherwise; what it was
made for is kept apart from what it is used with, so training and evaluation may choose anew.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
from absl import app, flags, logging

from dga_jax.checkpoint import CheckpointError, Checkpoints, list_steps
from dga_jax.conversion.exporting import export_hugging_face
from dga_jax.conversion.gguf_file import GGUFFile
from dga_jax.conversion.hugging_face import HuggingFaceFolder
from dga_jax.conversion.importing import import_params
from dga_jax.conversion.placement import parse_mesh, shardings
from dga_jax.conversion.source import Source
from dga_jax.model import ModelConfig
from dga_jax.model.config import AttentionName, DtypeName

_SOURCE = flags.DEFINE_string("source", None, "A Hugging Face folder or a GGUF file to import.")
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the checkpoint: written with --source, read with --to_hf.",
  required=True,
)
_TO_HF = flags.DEFINE_string("to_hf", None, "Folder to be made for transformers.")
_STEP = flags.DEFINE_integer("step", None, "With --to_hf, which checkpoint; default: the newest.")
_PARAM_DTYPE = flags.DEFINE_enum(
  "param_dtype",
  None,
  get_args(DtypeName),
  "Dtype of the stored weights; default: the files' own, and float32 for quantized ones.",
)
_DTYPE = flags.DEFINE_enum(
  "dtype", None, get_args(DtypeName), "Dtype to compute in; default: that of the weights."
)
_ATTENTION = flags.DEFINE_enum(
  "attention", None, get_args(AttentionName), "Attention kind to use the model with."
)
_END_TOKEN = flags.DEFINE_string(
  "end_token", None, "Token that ends a text; default: the one that the files name."
)
_MESH = flags.DEFINE_string(
  "mesh", None, "Devices to spread the weights over while importing, e.g. data=2,model=4."
)


def main(argv: Sequence[str]) -> None:
  """Imports or exports, by the flags."""
  if len(argv) > 1:
    raise app.UsageError(f"{argv[1]!r} is no flag.")
  logging.set_verbosity(logging.WARNING)  # The checkpoint library reports every write.
  source, to_hf = _SOURCE.value, _TO_HF.value
  try:
    if source is not None and to_hf is None:
      print(import_by_flags(Path(source)))
    elif to_hf is not None and source is None:
      export_hugging_face(_WORKDIR.value, Path(to_hf), step=_STEP.value)
      print(f"{to_hf} holds the model for transformers.")
    else:
      raise app.UsageError("Give one of --source (to import) and --to_hf (to export).")
  except (CheckpointError, ValueError, OSError) as error:
    raise SystemExit(f"error: {error}") from error


def import_by_flags(path: Path) -> str:
  """Imports what is at `path` and returns a summary."""
  source = open_source(path)
  config = source.config()
  changes: dict[str, Any] = {}
  if _PARAM_DTYPE.value is not None:
    changes = {"param_dtype": _PARAM_DTYPE.value, "dtype": _PARAM_DTYPE.value}
  for name, flag in (("dtype", _DTYPE), ("attention", _ATTENTION)):
    if flag.value is not None:
      changes[name] = flag.value
  return import_model(
    source,
    dataclasses.replace(config, **changes),
    Path(_WORKDIR.value),
    end_token=_END_TOKEN.value,
    mesh=_MESH.value,
  )


def open_source(path: Path) -> Source:
  """A GGUF file or a Hugging Face folder, by what `path` is.

  Raises:
    FileNotFoundError: nothing there, or files are missing.
    ValueError: a damaged file, or one of another kind.
  """
  if path.is_dir():
    return HuggingFaceFolder(path)
  return GGUFFile(path)


def import_model(
  source: Source,
  config: ModelConfig,
  workdir: Path,
  *,
  end_token: str | None = None,
  mesh: str | None = None,
) -> str:
  """Writes a source's model as checkpoint 0 of `workdir`, all of it or nothing.

  Args:
    source: what to import.
    config: how to store and use it.
    workdir: a folder without checkpoints; it is made if need be.
    end_token: in place of the end token that the source names.
    mesh: a description for `parse_mesh`; None for one device.

  Returns:
    A summary of a few words.

  Raises:
    ValueError: `workdir` has a checkpoint, or the source is not what it should be.
    CheckpointError: it could not be written.
  """
  if list_steps(workdir):
    raise ValueError(f"{workdir} has a checkpoint already; name another --workdir.")
  tokenizer = source.tokenizer(end_token)
  if tokenizer.vocab_size > config.vocab_size:
    raise ValueError(
      f"The tokenizer has {tokenizer.vocab_size} tokens; the model's embedding has "
      f"{config.vocab_size} rows, so it must have at most as many."
    )
  placed = None if mesh is None else shardings(config, parse_mesh(mesh))
  params = import_params(source, config, placed)
  with Checkpoints(workdir, keep=1) as checkpoints:
    checkpoints.save(
      0,
      params=params,
      training={"step": jnp.int32(0)},
      data=None,
      config={"model": config.to_dict(), "origin": dict(source.origin())},
      tokenizer=tokenizer,
    )
  return (
    f"{workdir} holds the model: {config.num_layers} layers of width {config.embed_dim}, "
    f"vocabulary {config.vocab_size}, weights in {config.param_dtype}, attention "
    f"{config.attention}."
  )


if __name__ == "__main__":
  app.run(main)
