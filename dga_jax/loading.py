"""Loads a model for use: from a checkpoint, a Hugging Face folder or a GGUF file."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from dga_jax.chat.template import chat_template_of, template_sources
from dga_jax.checkpoint import abstract_decoder, list_steps, load_config, load_model
from dga_jax.choices import AttentionName, CacheDtypeName, DtypeName, WeightName
from dga_jax.config import retrofit
from dga_jax.head_budgets import HeadBudgets
from dga_jax.hub_names import check_exists
from dga_jax.model import (
  Decoder,
  ModelConfig,
  quantize_weights,
  weight_name,
)
from dga_jax.model.apply_budgets import apply_budgets, arrange_heads
from dga_jax.pretrained import default_budgets
from dga_jax.tokenizer import Tokenizer


class Loaded(NamedTuple):
  """A model.

  Attributes:
    model: the decoder.
    tokenizer: of the model, with its chat template.
    trained_length: tokens of the longest context that the model was trained on, None if unknown.
    is_imported: whether the weights come from another program, which attended densely.
  """

  model: Decoder
  tokenizer: Tokenizer
  trained_length: int | None
  is_imported: bool


def load(
  source: str | os.PathLike[str],
  *,
  step: int | None = None,
  attention: AttentionName | None = None,
  dtype: DtypeName | None = None,
  budgets: HeadBudgets | None = None,
  weights: WeightName | None = None,
  cache_dtype: CacheDtypeName | None = None,
) -> tuple[Decoder, Tokenizer]:
  """A model and its tokenizer, for `dga_jax.generate`.

      model, tokenizer = dga_jax.load("Llama-3.2-1B-Instruct", attention="dga")

  Args:
    source: the folder of a checkpoint (a workdir of training or of `dga convert`), a folder of
      Hugging Face's transformers, or a GGUF file. Reading the last two needs the extra "convert".
    step: of a checkpoint; None for the newest.
    attention: the attention kind; None for the model's own. "dga" has the settings of the
      checkpoint, or those of `dga_jax.config.retrofit` for the files of other programs. For an
      imported SmolLM2-135M it is "head_budgets" with `dga_jax.pretrained.default_budgets`.
    dtype: of the activations; None for the model's own.
    budgets: the setting of each KV head, for example `read_head_budgets` of the file that
      `dga calibrate` writes; None for the model's own attention, or its default budgets (see
      `attention`).
    weights: "int8" or "fp8" for weights in 8 bits, see `dga_jax.model.quantize_weights`; None for
      weights in `dtype`.
    cache_dtype: "int8" or "float8_e4m3fn" for caches in 8 bits: `DGAConfig.cache_dtype`, and
      `HeadBudgets.with_cache_dtype` of budgets; None for that of the model or of the budgets.

  Raises:
    FileNotFoundError: there is no model at `source`; the message names the remedy.
    CheckpointError: the checkpoint is damaged.
    ValueError: the files of another program are damaged, or of an unsupported model; budgets of
      another model; both `attention` and `budgets`; or `cache_dtype` for another attention kind.
  """
  loaded = load_with_facts(
    source,
    step=step,
    attention=attention,
    dtype=dtype,
    budgets=budgets,
    weights=weights,
    cache_dtype=cache_dtype,
  )
  return loaded[:2]


def load_with_facts(
  source: str | os.PathLike[str],
  *,
  step: int | None = None,
  attention: AttentionName | None = None,
  dtype: DtypeName | None = None,
  budgets: HeadBudgets | None = None,
  weights: WeightName | None = None,
  cache_dtype: CacheDtypeName | None = None,
  parts: int = 1,
) -> Loaded:
  """As `load`, with what is known of the model's training.

  Args:
    source: as for `load`, as all arguments but `parts` are.
    step: see there.
    attention: see there.
    dtype: see there.
    budgets: see there.
    weights: see there.
    cache_dtype: see there.
    parts: devices that split the KV heads. Heads with settings of their own are in the order for
      these devices if it gives them equal parts, else in the order for one device.
  """
  if attention is not None and budgets is not None:
    raise ValueError(f"attention is {attention!r} and budgets are given; give one of them.")
  changes = {"attention": attention, "dtype": dtype}
  given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
  path = Path(source)
  is_file = path.suffix == ".gguf" or (path / "config.json").is_file()
  if not list_steps(path) and is_file:
    if step is not None:
      raise ValueError(
        f"step is {step}, and {path} holds the files of another program, which have no steps; leave"
        " step out."
      )
    model, tokenizer, saved = _read_files(path, given)
  else:
    check_exists(path, "checkpoint, Hugging Face folder or GGUF file")
    saved = load_config(path, step)
    config = dataclasses.replace(ModelConfig.from_dict(saved["model"]), **given)
    model, _, tokenizer = load_model(path, step, config=config)
  origin = saved.get("origin") or {}
  # A run of the trainer that starts from an import keeps the entry "origin", and adds "data".
  is_imported = bool(origin) and "data" not in saved
  if budgets is None and is_imported:
    budgets = default_budgets(model.config)
  if cache_dtype is not None:
    if budgets is None:
      model = _with_cache_dtype(model, cache_dtype)
    else:
      budgets = budgets.with_cache_dtype(cache_dtype)
  own = model.config.head_budgets if budgets is None else budgets
  if own is not None:
    arrange = arrange_heads if budgets is None else apply_budgets
    model = arrange(model, own, parts=parts if own.has_equal_parts(parts) else 1)
  if weights is not None:
    model = quantize_weights(model, weights)
  if template_sources(origin):
    tokenizer.chat_template = chat_template_of(origin, tokenizer)
  return Loaded(model, tokenizer, trained_length(saved), is_imported)


def trained_length(saved: Mapping[str, Any]) -> int | None:
  """The longest context, in tokens, of the training of a model; None if it is unknown.

  Args:
    saved: the config of a checkpoint. A model trained here has the sequence length of its data; an
      imported model has what its files state.
  """
  lengths = [
    (saved.get("data") or {}).get("sequence_length"),
    (saved.get("origin") or {}).get("max_position_embeddings"),
  ]
  return max((length for length in lengths if length is not None), default=None)


def with_attention(model: Decoder, attention: AttentionName) -> Decoder:
  """The model with the same weights and another attention kind."""
  return _with_config(model, dataclasses.replace(model.config, attention=attention))


def _with_config(model: Decoder, config: ModelConfig) -> Decoder:
  """The model with the same weights and other settings."""
  structure, _ = abstract_decoder(config, weight_name(model))
  changed: Decoder = nnx.merge(structure, nnx.state(model, nnx.Param))
  return changed


def _with_cache_dtype(model: Decoder, cache_dtype: CacheDtypeName) -> Decoder:
  """The model with caches in 8 bits; raises ValueError for an attention kind without them."""
  config = model.config
  if config.attention == "dga":
    dga = dataclasses.replace(config.dga, cache_dtype=cache_dtype)
    return _with_config(model, dataclasses.replace(config, dga=dga))
  if config.attention == "head_budgets" and config.head_budgets is not None:
    budgets = config.head_budgets.with_cache_dtype(cache_dtype)
    return _with_config(model, dataclasses.replace(config, head_budgets=budgets))
  raise ValueError(
    f"cache_dtype is {cache_dtype!r}, and attention is {config.attention!r}; it must be None for"
    " this attention. Caches in 8 bits need attention='dga', or head budgets (budgets=,"
    " --budgets)."
  )


def _read_files(path: Path, changes: Mapping[str, Any]) -> tuple[Decoder, Tokenizer, dict]:
  """The model of another program's files, its tokenizer, and a config as a checkpoint has it."""
  from dga_jax.conversion.importing import check_vocabulary, import_params, open_source

  source = open_source(path)
  config = source.config()
  dga = retrofit(has_selector=config.focal_selector)
  config = dataclasses.replace(config, **{"dga": dga, **changes})
  tokenizer = source.tokenizer()
  check_vocabulary(source, config, tokenizer)
  model: Decoder = nnx.merge(abstract_decoder(config)[0], import_params(source, config))
  return model, tokenizer, {"model": config.to_dict(), "origin": dict(source.origin())}
