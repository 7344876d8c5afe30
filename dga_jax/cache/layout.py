"""The layout and the size of the compact cache under a config.

The rule itself is `CacheLayout`: index arithmetic on ints or arrays. It is defined in
`pallas_kernels.decode.cache_layout`, because kernels use it too and import nothing of `dga_jax`.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from dga_jax.attention.streaming_blocks import cache_layout
from dga_jax.attention.validation import is_causal
from dga_jax.config import AggregationScale, CacheDtypeName, DGAConfig, GroupLogitBias, Selector
from pallas_kernels.decode.cache_layout import CacheLayout, CacheMask, TokenCoords

__all__ = [
  "CacheLayout",
  "CacheMask",
  "CacheSettings",
  "CacheSize",
  "TokenCoords",
  "cache_layout",
  "cache_size",
  "score_bytes",
]


class CacheSize(NamedTuple):
  """Compact entries and raw slots that a cache holds for each sequence, layer and KV head."""

  compact: int
  raw: int

  @property
  def total(self) -> int:
    """Compact entries and raw slots together."""
    return self.compact + self.raw


@dataclasses.dataclass(frozen=True)
class CacheSettings:
  """The fields of a `DGAConfig` that every call with one cache must share.

  They decide which entries a cache holds and what decoding computes from them. `selection` and the
  settings of its ranking are not among them: they only choose the prefix of a prompt.
  """

  group_size: int
  focal_in_block: int
  sink_tokens: int
  local_window: int
  selector: Selector
  aggregation_scale: AggregationScale
  group_logit_bias: GroupLogitBias
  cache_dtype: CacheDtypeName | None

  @classmethod
  def from_config(cls, config: DGAConfig) -> "CacheSettings":
    """The settings of a config."""
    return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

  def require(self, config: DGAConfig) -> None:
    """Checks that a config has these settings.

    Raises:
      ValueError: names the first field that differs, and both values.
    """
    for field in dataclasses.fields(self):
      given, own = getattr(config, field.name), getattr(self, field.name)
      if given != own:
        raise ValueError(
          f"config.{field.name} is {given!r}, and the cache was made with {own!r}; pass the config"
          " that the cache was made with."
        )


def score_bytes(config: DGAConfig) -> int:
  """Bytes of the focal scores that a cache holds for each sequence, layer and KV head."""
  return 4 * config.block_size if config.selector == "fitted" else 0


def cache_size(
  *, config: DGAConfig, max_length: int, prompt: int = 0, ragged: bool = False
) -> CacheSize:
  """The exact size of the cache of a sequence of `max_length` tokens.

  With L = max_length, s = sink_tokens and m' = m + f, streaming selection has
  s + (f + 1)·⌊(L − s)/m'⌋ compact entries and (w + 1)·m' raw slots. Global and random selection
  have the r + k entries of the prompt, f + 1 for every m' tokens after it, and m' raw slots.

  Args:
    config: of the cache.
    max_length: tokens of the sequence, prompt and new ones together.
    prompt: tokens of the (padded) prompt, which global and random selection rank as a whole.
    ragged: whether prompts may be shorter. The size is then the largest over the prompt's lengths:
      a short prompt leaves more blocks to decode.

  Raises:
    ValueError: if max_length is negative, prompt is not in 0..max_length, or config.causal is
      False.
  """
  is_causal(config, "a cache")
  if max_length < 0 or not 0 <= prompt <= max_length:
    raise ValueError(
      f"cache_size got max_length={max_length} and prompt={prompt}; it wants"
      " 0 <= prompt <= max_length. Raise max_length (prompt and new tokens together)."
    )
  layout, sinks = cache_layout(config), min(config.sink_tokens, max_length)
  if config.selection == "streaming":
    return CacheSize(int(layout.compact_size(max_length, sinks, sinks)), layout.raw_size)
  # Of every prompt length that may occur: where blocks begin, and the entries before them.
  lengths, quotas = np.arange(prompt + 1), config.focal_quota(prompt)
  origins = np.maximum(lengths, sinks)
  prefixes = np.maximum(quotas + (lengths - quotas) // config.group_size, sinks)
  sizes = layout.compact_size(max_length, origins, prefixes)
  return CacheSize(int(sizes.max() if ragged else sizes[-1]), layout.raw_size)
