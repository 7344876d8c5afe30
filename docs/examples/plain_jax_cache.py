"""Plain JAX: a layer that reads a prompt and decodes with the compact cache.

Command: `python docs/examples/plain_jax_cache.py`
"""

import functools

import jax
import jax.numpy as jnp

from dga_jax import DGAConfig, dynamic_group_attention
from dga_jax.cache import attend_and_prefill, cache_size, CompactCache, decode_step

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 8, 2, 32, 128
config = DGAConfig(selection="streaming", group_size=14, focal_per_block=2, sink_tokens=4)
keys = jax.random.split(jax.random.key(0), 3)
params = {
  name: jax.random.normal(key, (WIDTH, heads, HEAD_DIM)) * WIDTH**-0.5
  for name, key, heads in zip(
    ("query", "key", "value"), keys, (HEADS, KV_HEADS, KV_HEADS), strict=True
  )
}


def project(params: dict, states: jax.Array) -> list[jax.Array]:
  """Query, key and value [batch, length, heads, head_dim] of states [batch, length, width]."""
  return [jnp.einsum("ble,ehd->blhd", states, params[name]) for name in ("query", "key", "value")]


@functools.partial(jax.jit, static_argnames="max_length")
def read(params: dict, states: jax.Array, *, max_length: int) -> tuple[jax.Array, CompactCache]:
  """Attention over a prompt, and its cache."""
  return attend_and_prefill(*project(params, states), config=config, max_length=max_length)


@functools.partial(jax.jit, donate_argnums=2)
def step(params: dict, states: jax.Array, cache: CompactCache) -> tuple[jax.Array, CompactCache]:
  """Attention of one more token, states [batch, 1, width], and the new cache."""
  return decode_step(*project(params, states), cache, config=config)


states = jax.random.normal(jax.random.key(1), (2, 520, WIDTH))
out, cache = read(params, states[:, :512], max_length=520)
outputs = [out]
for position in range(512, 520):
  out, cache = step(params, states[:, position : position + 1], cache)
  outputs.append(out)

attend = jax.jit(functools.partial(dynamic_group_attention, config=config))
whole = attend(*project(params, states))
difference = jnp.abs(jnp.concatenate(outputs, axis=1) - whole).max()
entries = cache_size(config=config, max_length=520).total
print(f"{entries} cache entries for 520 tokens; largest difference to attention over the whole:")
print(f"{difference:.1e}")
