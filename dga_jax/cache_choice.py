"""Which cache is smaller for a length: the compact one of DGA, or a dense one."""

import sys

import jax.numpy as jnp

from dga_jax.cache.layout import cache_layout, cache_size
from dga_jax.loading import Loaded, with_attention
from dga_jax.model import ModelConfig


def compact_over_dense(config: ModelConfig, length: int) -> float:
  """The bytes of DGA's cache over those of a dense cache, for sequences of `length` tokens."""
  size = cache_size(config=config.dga, max_length=length, prompt=0)
  bytes_of_value = jnp.dtype(config.dtype).itemsize
  if config.dga.cache_dtype is None:
    compact = float(size.compact)
  else:  # 8 bits for each value, and a float32 scale for each entry.
    compact = size.compact * (1 + 4 / config.head_dim) / bytes_of_value
  return (compact + size.raw) / length


def equals_dense(config: ModelConfig, length: int) -> bool:
  """Whether every query of `length` tokens sees all earlier tokens raw, so that DGA is dense."""
  dga = config.dga
  if dga.selection != "streaming":
    return False
  return length <= dga.sink_tokens + (dga.local_window + 1) * cache_layout(dga).block_size


def shortest_saving(config: ModelConfig) -> int:
  """The least power of two of tokens from which DGA's cache is smaller than a dense one."""
  length = 64
  while compact_over_dense(config, length) >= 1 and length < 1 << 24:
    length *= 2
  return length


def with_smaller_cache(loaded: Loaded, length: int, *, is_chosen: bool) -> Loaded:
  """The model with dense attention, if DGA's cache would be larger; prints a note on stderr.

  Dense attention replaces DGA if both compute the same, or if the model was pretrained with dense
  attention. A model that was trained here with DGA keeps it.

  Args:
    loaded: a model.
    length: tokens of the longest sequence, prompt and continuation.
    is_chosen: whether the user has chosen the attention kind, which then stays.
  """
  config = loaded.model.config
  if config.attention != "dga" or (ratio := compact_over_dense(config, length)) <= 1:
    return loaded
  fact = (
    f"note: for {length} tokens the cache of DGA is {ratio:.1f} times as large as a dense cache; it"
    f" is smaller from about {shortest_saving(config)} tokens on."
  )
  is_same = equals_dense(config, length)
  if is_chosen or not (is_same or loaded.is_imported):
    print(f"{fact} DGA stays.", file=sys.stderr)
    return loaded
  same = ", which computes the same for so short a text" if is_same else ""
  print(f"{fact} Using dense attention{same}; --attention=dga keeps DGA.", file=sys.stderr)
  return loaded._replace(model=with_attention(loaded.model, "dense"))
