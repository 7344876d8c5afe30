"""The compact cache: prefill writes it, decoding reads it and lets it grow by summaries."""

from dga_jax.cache.decode import decode_step
from dga_jax.cache.extend import extend
from dga_jax.cache.prefill import prefill
from dga_jax.cache.state import cache_size, CacheSize, CompactCache, empty_cache

__all__ = [
  "CacheSize",
  "CompactCache",
  "cache_size",
  "decode_step",
  "empty_cache",
  "extend",
  "prefill",
]
