"""The compact cache of Dynamic Group Attention, for any model: one layer at a time, no `Decoder`.

Dense attention keeps one key and one value per token. The compact cache keeps f focal tokens and
one merged group for every block of m + f tokens, and the raw tokens of the last blocks. `prefill`
fills a cache with prompts, `decode_step` appends one token per sequence and attends, `extend`
appends many, and `cache_size` counts the entries. Keys carry RoPE if the model has it.

A layer with 8 query heads and 2 KV heads reads two prompts, the second one shorter, and decodes
four tokens:

>>> import functools
>>> import jax
>>> import jax.numpy as jnp
>>> import dga_jax.cache
>>> from dga_jax import DGAConfig
>>> B, L, H, N, D = 2, 100, 8, 2, 64
>>> config = DGAConfig(selection="streaming", group_size=14, focal_per_block=2, sink_tokens=4)
>>> def project(seed, *shape):  # stands for the projections of a model
...   return jax.random.normal(jax.random.key(seed), (*shape, D), jnp.bfloat16)
>>> query, key, value = project(0, B, L, H), project(1, B, L, N), project(2, B, L, N)
>>> cache = dga_jax.cache.prefill(
...   key, value, query, config=config, max_length=160, lengths=[100, 81]
... )
>>> step = functools.partial(dga_jax.cache.decode_step, config=config)
>>> step = jax.jit(step, donate_argnums=3)  # updates the cache in place
>>> for t in range(4):
...   query, key, value = project(t, B, H), project(t + 4, B, N), project(t + 8, B, N)
...   out, cache = step(query, key, value, cache)
>>> out.shape, cache.length.tolist()
((2, 8, 64), [104, 85])
>>> cache.arrays.compact_key.shape  # 4 sinks, and 3 entries for each of the 9 blocks of 160 tokens
(2, 2, 31, 64)
>>> dga_jax.cache.cache_size(config=config, max_length=160)
CacheSize(compact=31, raw=16)

`attend_and_prefill` also returns the output of attention over the prompts. `extend` appends a later
turn of the conversation in one call, here 9 tokens of the first sequence and 2 of the second:

>>> turn = project(0, B, 9, H), project(1, B, 9, N), project(2, B, 9, N)
>>> out, cache = dga_jax.cache.extend(*turn, cache, config=config, lengths=[9, 2])
>>> out.shape, cache.length.tolist()
((2, 9, 8, 64), [113, 87])

A model with many layers keeps one cache per layer, or stacks them on a leading axis and passes
`layer=` to `decode_step` and `extend`.
"""

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
