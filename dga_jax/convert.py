"""Imports models from Hugging Face folders and GGUF files, and exports them.

  dga convert --source=DIR_OR_FILE.gguf --workdir=runs/imported
  dga generate --workdir=runs/imported --prompt="The capital of France is"
  dga convert --workdir=runs/imported --to_hf=exported

Supported are LLaMA 2 and 3, Mistral, Qwen 2.5, Qwen 3 and SmolLM. The import
includes the tokenizer, the tokens that end a generation, and the chat template.
Reading and writing models needs the extra "convert".

An imported model has the attention of its source, dense or Mistral's window,
unless --attention names another kind. Generation, training and evaluation can
choose another kind for the same weights. --attention=dga has one setting for
all heads; `dga calibrate` makes a setting for each KV head. For SmolLM2-135M
the package has such settings, and --attention=dga uses them.

Every key of config.json and of GGUF metadata is implemented, or known not to
change the model, or refused. --ignore_keys accepts an unknown key.
"""

import dataclasses
from pathlib import Path
from typing import Any, get_args

from absl import app, flags

from dga_jax import command_line
from dga_jax.choices import AttentionName, DtypeName
from dga_jax.files.path_flags import define_path
from dga_jax.flag_help import FlagGroups
from dga_jax.hub_names import check_exists

_GROUPS = FlagGroups()

_GROUPS.start("Import and export")
_SOURCE = define_path("source", None, "A Hugging Face folder or a GGUF file to import.")
_WORKDIR = define_path(
  "workdir",
  None,
  "Folder of the checkpoint: written with --source, read with --to_hf.",
  required=True,
)
_TO_HF = define_path("to_hf", None, "Folder to be made for transformers.")
_STEP = flags.DEFINE_integer("step", None, "With --to_hf, which checkpoint; default: the newest.")
_IGNORE_KEYS = flags.DEFINE_list(
  "ignore_keys",
  [],
  "Unknown keys of config.json or of GGUF metadata that change nothing in what the model computes.",
)

_GROUPS.start("Weights and attention")
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
_MESH = flags.DEFINE_string(
  "mesh", None, "Devices to spread the weights over while importing, e.g. fsdp=2,tensor=4."
)

_GROUPS.start("Tokenizer")
_END_TOKEN = flags.DEFINE_string(
  "end_token",
  None,
  "Token that ends a text; default: the one that the files name. Every eos_token_id of the files "
  "stops a generation as well.",
)
_ADD_BOS_TOKEN = flags.DEFINE_bool(
  "add_bos_token",
  None,
  "Whether a begin token is put before a text; default: what the files say.",
)
_ADD_EOS_TOKEN = flags.DEFINE_bool(
  "add_eos_token",
  None,
  "--noadd_eos_token leaves out an end token that the files put behind every text.",
)
_TOKENIZER_PRE = flags.DEFINE_string(
  "tokenizer_pre",
  None,
  "Rule that splits a text into words, for GGUF files without tokenizer.ggml.pre, e.g. llama-bpe.",
)


def main() -> None:
  """Imports or exports, by the flags."""
  source, to_hf = _SOURCE.value, _TO_HF.value
  if source is not None and to_hf is None:
    print(import_by_flags(Path(source)))
  elif to_hf is not None and source is None:
    from dga_jax.conversion.exporting import export_hugging_face

    export_hugging_face(_WORKDIR.value, Path(to_hf), step=_STEP.value)
    print(f"{to_hf} holds the model for transformers.")
  else:
    raise app.UsageError("Give one of --source (to import) and --to_hf (to export).")


def import_by_flags(path: Path) -> str:
  """Imports the model at `path` and returns a summary."""
  check_exists(path, "Hugging Face folder or GGUF file")
  from dga_jax.config import retrofit
  from dga_jax.conversion.checkpoint_reader import TokenizerChoices
  from dga_jax.conversion.importing import import_model, open_source
  from dga_jax.pretrained import calibration_note

  source = open_source(path, _IGNORE_KEYS.value)
  config = source.config()
  changes: dict[str, Any] = {"dga": retrofit(has_selector=config.focal_selector)}
  if _PARAM_DTYPE.value is not None:
    changes |= {"param_dtype": _PARAM_DTYPE.value, "dtype": _PARAM_DTYPE.value}
  for name, flag in (("dtype", _DTYPE), ("attention", _ATTENTION)):
    if flag.value is not None:
      changes[name] = flag.value
  config = dataclasses.replace(config, **changes)
  summary = import_model(
    source,
    config,
    Path(_WORKDIR.value),
    choices=TokenizerChoices(
      end_token=_END_TOKEN.value,
      add_bos_token=_ADD_BOS_TOKEN.value,
      add_eos_token=_ADD_EOS_TOKEN.value,
      pre=_TOKENIZER_PRE.value,
    ),
    mesh=_MESH.value,
  )
  note = calibration_note(config, str(_WORKDIR.value))
  return summary if note is None else f"{summary}\n{note}"


if __name__ == "__main__":
  command_line.run(main, _GROUPS)
