"""LM-Infinite (Han et al., arXiv 2308.16137): a Λ-shaped mask and a bound on distances."""

import dataclasses
from typing import ClassVar, Self

import numpy as np

from dga_jax.model.attention_kinds.baseline_settings import BaselineSettings
from dga_jax.model.attention_kinds.rotated_sinks import RotatedSinksAttention


@dataclasses.dataclass(frozen=True)
class LMInfiniteConfig(BaselineSettings):
  """Global tokens and a local window.

  Attributes:
    global_tokens: the number of first tokens that every query sees.
    local_window: the number of last tokens that a query sees, its own token included. It is also
      the largest distance that enters RoPE: a global token farther away is rotated as if it were
      at this distance.
  """

  global_tokens: int = 10
  local_window: int = 4096

  _LEAST: ClassVar = {"local_window": 1}

  def with_budget(self, keys: int) -> Self:
    """The same global tokens, and a local window of `keys` − global_tokens tokens."""
    return self._with_budget(keys, self.global_tokens + 1, local_window=keys - self.global_tokens)


def lm_infinite(
  settings: LMInfiniteConfig, inverse_frequencies: np.ndarray
) -> RotatedSinksAttention:
  """The attention kind of these settings.

  Args:
    settings: sizes.
    inverse_frequencies: ω [D/2] of the model's RoPE.
  """
  return RotatedSinksAttention(
    "lm_infinite",
    settings.local_window,
    settings.global_tokens,
    "at_most_window",
    tuple(inverse_frequencies),
  )
