"""What an import reads: a model's description, its tokenizer, and tensors by name."""

from collections.abc import Mapping, Set
from typing import Any, Protocol

import numpy as np

from dga_jax.conversion.param_map import Naming
from dga_jax.model import ModelConfig
from dga_jax.model.config import DtypeName
from dga_jax.tokenizer import Tokenizer


class Source(Protocol):
  """A checkpoint of another program, whose tensors are read one at a time.

  Attributes:
    naming: whose names the tensors bear.
    names: of all tensors.
  """

  naming: Naming

  @property
  def names(self) -> Set[str]:
    """The tensors in the files."""

  def config(self) -> ModelConfig:
    """The decoder that the checkpoint describes; `param_dtype` is that of the stored weights.

    Raises:
      ValueError: an architecture, or a feature of one, that the decoder does not have.
    """

  def tokenizer(self, end_token: str | None) -> Tokenizer:
    """The tokenizer; `end_token` takes the place of the end token that it names itself.

    Raises:
      ValueError: there is none, or one of an unknown kind.
    """

  def origin(self) -> Mapping[str, Any]:
    """What else an export needs to know; JSON."""

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor."""

  def read(self, name: str) -> np.ndarray:
    """A tensor, in a floating-point dtype.

    Raises:
      ValueError: it is stored in a form that cannot be read.
    """


def common_dtype(dtypes: Set[str]) -> DtypeName:
  """The one dtype of the stored weights; float32 where they have several."""
  if len(dtypes) == 1 and (only := next(iter(dtypes))) in ("bfloat16", "float16"):
    return only  # type: ignore[return-value]
  return "float32"
