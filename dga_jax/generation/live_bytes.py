"""Bytes of the cache entries that the next token of a sequence sees."""

import jax.numpy as jnp

from dga_jax.cache.layout import cache_layout
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import FULL, HeadSetting
from dga_jax.model.config import ModelConfig

_SCALE_BYTES = 4  # Of an entry with 8-bit numbers: one float32 for its key, one for its value.


def live_bytes(config: ModelConfig, length: int) -> int:
  """Bytes of the keys and values that the token after `length` tokens sees, without itself.

  Under DGA these are the compact entries of the blocks before the raw window, and the raw tokens.

  Args:
    config: attention "dense", "head_budgets", or "dga" with streaming selection.
    length: tokens of the sequence.

  Raises:
    ValueError: the attention kind is another one.
  """
  heads = config.num_layers * config.num_kv_heads
  if config.attention == "dense":
    return heads * _head_bytes(FULL, config, length)
  if config.attention == "head_budgets" and config.head_budgets is not None:
    counts = config.head_budgets.counts().items()
    return sum(count * _head_bytes(setting, config, length) for setting, count in counts)
  if config.attention == "dga" and config.dga.selection == "streaming":
    return heads * _head_bytes(config.dga, config, length)
  raise ValueError(
    f"attention is {config.attention!r}; live_bytes counts 'dense', 'head_budgets', and 'dga' with"
    " streaming selection."
  )


def _head_bytes(setting: HeadSetting, config: ModelConfig, length: int) -> int:
  """Bytes of one KV head of one layer."""
  entry = 2 * config.head_dim * jnp.dtype(config.dtype).itemsize
  if not isinstance(setting, DGAConfig):
    return length * entry
  layout, sinks = cache_layout(setting), setting.sink_tokens
  token = layout.locate(length, sinks)
  compact = int(layout.earlier_blocks(token, prefix=sinks).compact_end)
  raw = int(layout.raw_tokens(token)) if token.in_block else 0
  small = entry if setting.cache_dtype is None else 2 * (config.head_dim + _SCALE_BYTES)
  return compact * small + raw * entry
