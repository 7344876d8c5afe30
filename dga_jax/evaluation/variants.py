"""Variants of a model: the same parameters with different attention kinds and settings."""

import dataclasses
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dga_jax.checkpoint import abstract_decoder
from dga_jax.evaluation.answers import Answers
from dga_jax.generation.cache_shapes import content_bytes
from dga_jax.model import Decoder, ModelConfig, weight_name
from dga_jax.model.attention_kinds.token_selection import HeadShape, TokenSelectionAttention
from dga_jax.model.config import ATTENTION_SETTINGS
from dga_jax.tokenizer import Tokenizer

_OVERRIDES = {"attention", *ATTENTION_SETTINGS, "rope_base", "rope_scaling", "dtype"}


@dataclasses.dataclass(frozen=True)
class Variant:
  """An attention kind and its settings, for the parameters of a model.

  Attributes:
    name: for tables and plots.
    overrides: fields of ModelConfig. The settings of an attention kind replace all of the model's
      settings: fields that are not given have their defaults.
    keys: cache budget in tokens, set by the settings' `with_budget`; a number below 1 is a share of
      the sequence. None leaves the settings unchanged.
  """

  name: str
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  keys: float | None = None

  def config(self, base: ModelConfig, length: int) -> ModelConfig:
    """The model's config for sequences of `length` tokens.

    Raises:
      ValueError: an override that changes the parameters, an unknown field, a wrong value, head
        budgets for a model that has others, or `keys` for an attention kind without a budget.
    """
    for name in self.overrides:
      if name not in _OVERRIDES:
        raise ValueError(
          f"variant {self.name!r} sets {name!r}; a variant may set {', '.join(sorted(_OVERRIDES))}."
        )
    config = ModelConfig.from_dict({**base.to_dict(), **self.overrides})
    if base.head_budgets not in (None, config.head_budgets):
      raise ValueError(
        f"variant {self.name!r} sets head_budgets, and the model has other head budgets, for which "
        "its heads were put into an order. Give budgets of the model from before any budgets, with "
        "--budgets=FILE."
      )
    if self.keys is None:
      return config
    settings: Any = getattr(config, config.attention, None)
    if not hasattr(settings, "with_budget"):
      raise ValueError(
        f"variant {self.name!r} has keys={self.keys}, but attention={config.attention!r} has no"
        " budget to set."
      )
    keys = round(self.keys * length) if self.keys < 1 else int(self.keys)
    return dataclasses.replace(config, **{config.attention: settings.with_budget(keys)})


def read_variants(text: str) -> list[Variant]:
  """Variants from JSON text or from a JSON file.

  Args:
    text: the path of the file, or a list of objects with "name", optionally "keys", and fields of
      ModelConfig, such as
      {"name": "streaming", "attention": "dga", "dga": {"selection": "streaming"}}.

  Raises:
    OSError: the file cannot be read.
    ValueError: the JSON is not such a list, or two variants have the same name.
  """
  source = text
  if not text.lstrip().startswith("["):
    source = Path(text).read_text(encoding="utf-8")
  try:
    entries = json.loads(source)
  except json.JSONDecodeError as error:
    raise ValueError(f"variants is not JSON: {error}") from error
  if not isinstance(entries, list) or not entries:
    raise ValueError("variants must be a list of objects with at least one entry.")
  variants = []
  for entry in entries:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
      raise ValueError(f'variants has {entry!r}; every entry must be an object with a "name".')
    if not isinstance(entry.get("keys"), int | float | None) or entry.get("keys") is True:
      raise ValueError(f"keys of variant {entry['name']!r} is {entry['keys']!r}; give a number.")
    rest = {key: value for key, value in entry.items() if key not in ("name", "keys")}
    variants.append(Variant(entry["name"], rest, entry.get("keys")))
  names = [variant.name for variant in variants]
  if len(set(names)) < len(names):
    raise ValueError(f"variants has a name twice: {names}; names must differ.")
  return variants


class Family:
  """The variants of a loaded model, which share its parameters.

  Args:
    model: the loaded decoder; variants override its config.
    start_ids: tokens that start a document.
  """

  def __init__(self, model: Decoder, start_ids: Sequence[int] = ()) -> None:
    self.config = model.config
    self.params = nnx.state(model, nnx.Param)
    self.weights = weight_name(model)
    self.start_ids = tuple(start_ids)
    self._answers = threading.local()

  def graphdef(self, variant: Variant, length: int) -> nnx.GraphDef:
    """The graph definition of a variant, for programs with the parameters as an argument."""
    return abstract_decoder(variant.config(self.config, length), self.weights)[0]

  def model(self, variant: Variant, length: int) -> Decoder:
    """The decoder of a variant, which shares the parameters."""
    return nnx.merge(self.graphdef(variant, length), self.params)

  def answers(
    self, variant: Variant, length: int, tokenizer: Tokenizer, batch_size: int
  ) -> Answers:
    """The programs that answer prompts of `length` tokens, which include the answer.

    Each thread keeps the programs of its last call, so that jobs of the same variant and length
    compile them once.
    """
    config, kept = variant.config(self.config, length), self._answers
    key = (config, length, batch_size)
    if getattr(kept, "key", None) != key:
      kept.key = kept.answers = None  # Frees the memory of the earlier cache.
      model = self.model(variant, length)
      kept.answers = Answers(model, tokenizer, length=length, batch_size=batch_size)
      kept.key = key
    answers: Answers = kept.answers
    return answers

  def decodes_as_whole(self, variant: Variant, length: int) -> bool:
    """Whether decoding token by token computes the same function as a whole sequence.

    It does not if later queries choose what earlier queries see.
    """
    config = variant.config(self.config, length)
    if config.attention == "dga":
      return config.dga.selection == "streaming"
    settings = getattr(config, config.attention, None)
    if config.attention == "minference" or getattr(settings, "dense_prompt", False):
      return False
    return not isinstance(config.make_attention(), TokenSelectionAttention)

  def budget(self, variant: Variant, length: int) -> "Budget":
    """The size of the variant's cache after a prompt of `length` tokens."""
    return measure_budget(self.graphdef(variant, length), self.params, length)


@dataclasses.dataclass(frozen=True)
class Budget:
  """The memory of a cache after a prompt.

  It is counted in the floating-point arrays of the cache. For kinds that select tokens of a cache
  that holds all of them, it is what the method stores.

  Attributes:
    keys: the memory in tokens: bytes of a sequence, layer and head, over the bytes of one key and
      value. Other arrays of the attention kind, such as scores, are included.
    share: `keys` over the tokens of the prompt.
    bytes: of all layers and heads, for one sequence.
    read_share: as `share`, of what a decoding step reads of the prompt's cache, at most.
  """

  keys: float
  share: float
  bytes: int
  read_share: float


def measure_budget(graphdef: nnx.GraphDef, params: Any, length: int) -> Budget:
  """The budget after a prefill of one prompt of `length` tokens, from shapes alone."""
  config: ModelConfig = nnx.merge(graphdef, params).config
  entry = 2 * config.num_layers * config.num_kv_heads * config.head_dim
  entry *= jnp.dtype(config.dtype).itemsize
  kind = config.make_attention()
  if isinstance(kind, TokenSelectionAttention):
    shape = HeadShape(
      query_heads=config.num_heads // config.num_kv_heads,
      head_dim=config.head_dim,
      bits=8 * jnp.dtype(config.dtype).itemsize,
    )
    layers = [kind.prompt_memory(length, layer, shape) for layer in range(config.num_layers)]
    stored, read = (sum(each) / config.num_layers for each in zip(*layers, strict=True))
    return Budget(stored, stored / length, round(stored * entry), read / length)

  def prefill(params: Any) -> Any:
    tokens = jnp.zeros((1, length), jnp.int32)
    return nnx.merge(graphdef, params).prefill(tokens, max_length=length)[1].layers

  size = content_bytes(jax.eval_shape(prefill, params))
  keys = size / entry
  return Budget(keys=keys, share=keys / length, bytes=size, read_share=keys / length)
