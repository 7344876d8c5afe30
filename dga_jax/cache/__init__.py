"""The compact cache of Dynamic Group Attention: prefill fills it, decoding appends to it."""

from dga_jax.cache.chunked_prefill import extend
from dga_jax.cache.decode import decode_step
from dga_jax.cache.layout import cache_size, CacheSize
from dga_jax.cache.prompt import attend_and_prefill, prefill
from dga_jax.cache.state import CompactCache, empty_cache

__all__ = [
  "CacheSize",
  "CompactCache",
  "attend_and_prefill",
  "cache_size",
  "decode_step",
  "empty_cache",
  "extend",
  "prefill",
]
