"""StreamingLLM (Xiao et al., arXiv 2309.17453): attention sinks and a window."""

import dataclasses
from typing import ClassVar, Self

import numpy as np

from dga_jax.model.attention_kinds.baseline_settings import BaselineSettings
from dga_jax.model.attention_kinds.rotated_sinks import RotatedSinksAttention


@dataclasses.dataclass(frozen=True)
class StreamingLLMConfig(BaselineSettings):
  """Positions count within the cache.

  Attributes:
    sinks: the number of first tokens that every query sees.
    window: the number of last tokens that a query sees, its own token included.
  """

  sinks: int = 4
  window: int = 2000

  _LEAST: ClassVar = {"window": 1}

  def with_budget(self, keys: int) -> Self:
    """The same sinks, and a window of `keys` − sinks tokens."""
    return self._with_budget(keys, self.sinks + 1, window=keys - self.sinks)


def streaming_llm(
  settings: StreamingLLMConfig, inverse_frequencies: np.ndarray
) -> RotatedSinksAttention:
  """The attention kind of these settings.

  Args:
    settings: sizes.
    inverse_frequencies: ω [D/2] of the model's RoPE.
  """
  return RotatedSinksAttention(
    "streaming_llm", settings.window, settings.sinks, "in_cache", tuple(inverse_frequencies)
  )
