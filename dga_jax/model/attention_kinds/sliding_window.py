"""Sliding-window attention (Mistral 7B, arXiv 2310.06825)."""

import dataclasses
from typing import ClassVar, Self

from dga_jax.model.attention_kinds.baseline_settings import BaselineSettings
from dga_jax.model.attention_kinds.sink_window import SinkWindowAttention


@dataclasses.dataclass(frozen=True)
class SlidingWindowConfig(BaselineSettings):
  """Each query sees the last `window` tokens, its own token included."""

  window: int = 4096

  _LEAST: ClassVar = {"window": 1}

  def with_budget(self, keys: int) -> Self:
    """A window of `keys` tokens."""
    return self._with_budget(keys, 1, window=keys)


def sliding_window(settings: SlidingWindowConfig) -> SinkWindowAttention:
  """The attention kind of these settings."""
  return SinkWindowAttention("sliding_window", settings.window)
