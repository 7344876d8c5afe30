"""Variants of one model: the same parameters with other attention kinds and settings."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dga_jax.checkpoint import abstract_decoder
from dga_jax.model import Decoder, ModelConfig
from dga_jax.model.config import ATTENTION_SETTINGS

_OVERRIDES = {"attention", *ATTENTION_SETTINGS, "rope_base", "rope_scaling", "dtype"}


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to use the parameters.

  Attributes:
    name: for tables and plots.
    overrides: fields of ModelConfig. Settings of an attention kind replace all of the model's:
      fields that are not named take their defaults.
    keys: tokens for which the kind's cache is made by `with_budget`; a number below 1 is a share
      of the sequence. None leaves the settings as they are.
  """

  name: str
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  keys: float | None = None

  def config(self, base: ModelConfig, length: int) -> ModelConfig:
    """The model's config for sequences of `length` tokens.

    Raises:
      ValueError: an override that changes the parameters, an unknown field or value, or `keys`
        for a kind whose settings have no budget.
    """
    for name in self.overrides:
      if name not in _OVERRIDES:
        raise ValueError(
          f"variant {self.name!r} sets {name!r}; a variant may set {', '.join(sorted(_OVERRIDES))}."
        )
    config = ModelConfig.from_dict({**base.to_dict(), **self.overrides})
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
  """Variants from JSON, or from a file that holds it.

  Args:
    text: a list of objects with "name", optional "keys", and fields of ModelConfig, such as
      {"name": "streaming", "attention": "dga", "dga": {"selection": "streaming"}}; or the path
      of such a file.

  Raises:
    ValueError: it is no such list, or two variants share a name.
  """
  source = text
  if not text.lstrip().startswith("["):
    source = Path(text).read_text(encoding="utf-8")
  try:
    entries = json.loads(source)
  except json.JSONDecodeError as error:
    raise ValueError(f"variants is no JSON: {error}") from error
  if not isinstance(entries, list) or not entries:
    raise ValueError("variants is no list of objects, or an empty one.")
  variants = []
  for entry in entries:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
      raise ValueError(f'variants holds {entry!r}; each wants an object with a "name".')
    rest = {key: value for key, value in entry.items() if key not in ("name", "keys")}
    variants.append(Variant(entry["name"], rest, entry.get("keys")))
  names = [variant.name for variant in variants]
  if len(set(names)) < len(names):
    raise ValueError(f"variants has names more than once: {names}.")
  return variants


class Family:
  """A loaded model whose parameters serve every variant.

  Args:
    model: the loaded decoder; its config is the base of all variants.
    start_ids: tokens that stand before a document.
  """

  def __init__(self, model: Decoder, start_ids: Sequence[int] = ()) -> None:
    self.config = model.config
    self.params = nnx.state(model, nnx.Param)
    self.start_ids = tuple(start_ids)

  def graphdef(self, variant: Variant, length: int) -> nnx.GraphDef:
    """The structure of the variant, for programs that take the parameters as an argument."""
    return abstract_decoder(variant.config(self.config, length))[0]

  def model(self, variant: Variant, length: int) -> Decoder:
    """The decoder of a variant; shares the parameters."""
    return nnx.merge(self.graphdef(variant, length), self.params)

  def decodes_as_whole(self, variant: Variant, length: int) -> bool:
    """Whether token-by-token decoding computes what is computed over a whole sequence.

    It does not where later queries choose what earlier ones see.
    """
    config = variant.config(self.config, length)
    if config.attention == "dga":
      return config.dga.selection == "streaming"
    settings = getattr(config, config.attention, None)
    return config.attention != "minference" and not getattr(settings, "dense_prompt", False)

  def budget(self, variant: Variant, length: int) -> "Budget":
    """What the variant keeps of a prompt of `length` tokens."""
    return measure_budget(self.graphdef(variant, length), self.params, length)


@dataclasses.dataclass(frozen=True)
class Budget:
  """Memory of a cache after a prompt, counted in the arrays that hold it.

  Attributes:
    keys: tokens' worth of keys and values for each sequence, layer and head; what a kind keeps
      beside them (such as scores) counts by its bytes.
    share: keys over the tokens of the prompt.
    bytes: of all layers and heads, for one sequence.
  """

  keys: float
  share: float
  bytes: int


def measure_budget(graphdef: nnx.GraphDef, params: Any, length: int) -> Budget:
  """Counts the arrays that a prefill of one prompt of `length` tokens leaves; computes nothing."""

  def prefill(params: Any) -> Any:
    tokens = jnp.zeros((1, length), jnp.int32)
    return nnx.merge(graphdef, params).prefill(tokens, max_length=length)[1].layers

  arrays = jax.tree.leaves(jax.eval_shape(prefill, params))
  size = sum(x.size * x.dtype.itemsize for x in arrays if jnp.issubdtype(x.dtype, jnp.floating))
  config: ModelConfig = nnx.merge(graphdef, params).config
  entry = 2 * config.num_layers * config.num_kv_heads * config.head_dim
  keys = size / (entry * jnp.dtype(config.dtype).itemsize)
  return Budget(keys=keys, share=keys / length, bytes=size)
