"""Bytes of the cache entries that the next token of a sequence sees."""

import jax.numpy as jnp

from dga_jax.cache.layout import cache_layout
from dga_jax.choices import CacheDtypeName
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import FULL, HeadSetting, SinkWindow
from dga_jax.model.config import ModelConfig

_SCALE_BYTES = 4  # Of an entry with 8-bit numbers: one float32 for its key, one for its value.


def live_bytes(config: ModelConfig, length: int) -> int:
  """Bytes of the keys and values that the token after `length` tokens sees, without itself.

  Under DGA these are the compact entries of the blocks before the raw window, and the raw tokens.

  Args:
    config: of a model that reads prompts in pieces.
    length: tokens of the sequence.

  Raises:
    ValueError: the attention kind reads prompts whole.
  """
  counts = _settings(config)
  return sum(count * _head_bytes(setting, config, length) for setting, count in counts.items())


def _settings(config: ModelConfig) -> dict[HeadSetting, int]:
  """How many KV heads of all layers follow each setting."""
  if config.attention == "head_budgets" and config.head_budgets is not None:
    return config.head_budgets.counts()
  if config.attention == "dga" and config.dga.selection != "streaming":
    raise ValueError(
      f"selection is {config.dga.selection!r}; live_bytes needs selection='streaming'."
    )
  lm_infinite, streaming_llm = config.lm_infinite, config.streaming_llm
  settings: dict[str, HeadSetting] = {
    "dense": FULL,
    "dga": config.dga,
    "sliding_window": SinkWindow(config.sliding_window.window, sinks=0),
    "streaming_llm": SinkWindow(streaming_llm.window, sinks=streaming_llm.sinks),
    "lm_infinite": SinkWindow(lm_infinite.local_window, sinks=lm_infinite.global_tokens),
  }
  if config.attention not in settings:
    raise ValueError(
      f"attention is {config.attention!r}, which reads prompts whole; live_bytes counts"
      f" {', '.join([*settings, 'head_budgets'])}."
    )
  return {settings[config.attention]: config.num_layers * config.num_kv_heads}


def _head_bytes(setting: HeadSetting, config: ModelConfig, length: int) -> int:
  """Bytes of one KV head of one layer."""
  if not isinstance(setting, DGAConfig):
    budgets = config.head_budgets if config.attention == "head_budgets" else None
    entry = _entry_bytes(config, None if budgets is None else budgets.cache_dtype)
    if isinstance(setting, SinkWindow):
      return min(length, setting.sinks + setting.window - 1) * entry
    return length * entry
  layout, sinks = cache_layout(setting), setting.sink_tokens
  token = layout.locate(length, sinks)
  compact = int(layout.earlier_blocks(token, prefix=sinks).compact_end)
  raw = int(layout.raw_tokens(token)) if token.in_block else 0
  return compact * _entry_bytes(config, setting.cache_dtype) + raw * _entry_bytes(config, None)


def _entry_bytes(config: ModelConfig, cache_dtype: CacheDtypeName | None) -> int:
  """Bytes of a key and its value."""
  if cache_dtype is None:
    return 2 * config.head_dim * jnp.dtype(config.dtype).itemsize
  return 2 * (config.head_dim + _SCALE_BYTES)
