"""The interface of an import: a model's description, its tokenizer, and tensors by name."""

import dataclasses
from collections.abc import Mapping, Set
from typing import Any, Protocol

import numpy as np

from dga_jax.conversion.param_map import Naming
from dga_jax.model import ModelConfig
from dga_jax.model.config import DtypeName
from dga_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenizerChoices:
  """What a user decides about a tokenizer in place of its files; None leaves it to the files.

  Attributes:
    end_token: the token that ends a document.
    add_bos_token: whether the begin token is put before a text.
    add_eos_token: False drops an end token that the files put behind every text. True is not
      supported, since a prompt would end before the model continues it.
    pre: the rule that splits a text before the merges, a value of tokenizer.ggml.pre (GGUF only).
  """

  end_token: str | None = None
  add_bos_token: bool | None = None
  add_eos_token: bool | None = None
  pre: str | None = None

  def __post_init__(self) -> None:
    if self.add_eos_token:
      raise ValueError(
        "add_eos_token is True; it must be False or None, since a prompt with an end token behind "
        "it has no continuation."
      )


NO_CHOICES = TokenizerChoices()


class Source(Protocol):
  """A checkpoint of another program; tensors are read one at a time.

  Attributes:
    naming: whose names the tensors have.
    where: the file or folder, for messages.
  """

  naming: Naming
  where: str

  @property
  def names(self) -> Set[str]:
    """The tensors in the files."""

  def config(self) -> ModelConfig:
    """The decoder of the checkpoint; `param_dtype` is that of the stored weights.

    Raises:
      ConversionError: an architecture, or a feature of one, that the decoder does not have.
    """

  def tokenizer(self, choices: TokenizerChoices = NO_CHOICES) -> Tokenizer:
    """The tokenizer, with every id that ends a text as a stop id.

    Raises:
      ConversionError: there is none, one of an unknown kind, or its files contradict each other.
    """

  def origin(self) -> Mapping[str, Any]:
    """What an export needs besides the decoder and the tokenizer; JSON. See `origin.py`."""

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor."""

  def read(self, name: str) -> np.ndarray:
    """A tensor, in a floating-point dtype.

    Raises:
      ConversionError: it is stored in a form that cannot be read.
    """


def common_dtype(dtypes: Set[str]) -> DtypeName:
  """The one dtype of the stored weights; float32 where they have several."""
  if len(dtypes) == 1 and (only := next(iter(dtypes))) in ("bfloat16", "float16"):
    return only  # type: ignore[return-value]
  return "float32"
