"""Equinox: a module without a batch axis, under `eqx.filter_vmap` or alone.

Command: `pip install equinox && python docs/examples/equinox_module.py`
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from dga_jax import DGAConfig, dynamic_group_attention


class SelfAttention(eqx.Module):
  """Causal self-attention of one sequence [length, width] with 8 query heads and 2 KV heads."""

  query: eqx.nn.Linear
  key: eqx.nn.Linear
  value: eqx.nn.Linear
  out: eqx.nn.Linear
  config: DGAConfig = eqx.field(static=True)

  def __init__(self, width: int, head_dim: int, config: DGAConfig, *, key: jax.Array) -> None:
    """Random weights."""
    q, k, v, o = jax.random.split(key, 4)
    self.query = eqx.nn.Linear(width, 8 * head_dim, use_bias=False, key=q)
    self.key = eqx.nn.Linear(width, 2 * head_dim, use_bias=False, key=k)
    self.value = eqx.nn.Linear(width, 2 * head_dim, use_bias=False, key=v)
    self.out = eqx.nn.Linear(8 * head_dim, width, use_bias=False, key=o)
    self.config = config

  def __call__(self, states: jax.Array) -> jax.Array:
    """Attention of one sequence."""
    length = len(states)
    query = jax.vmap(self.query)(states).reshape(length, 8, -1)
    key = jax.vmap(self.key)(states).reshape(length, 2, -1)
    value = jax.vmap(self.value)(states).reshape(length, 2, -1)
    out = dynamic_group_attention(query, key, value, config=self.config)
    return jax.vmap(self.out)(out.reshape(length, -1))


config = DGAConfig(selection="streaming", group_size=14, focal_per_block=2)
module = SelfAttention(128, 32, config, key=jax.random.key(0))
states = jax.random.normal(jax.random.key(1), (2, 512, 128))
batch = eqx.filter_jit(eqx.filter_vmap(module))(states)
one = eqx.filter_jit(module)(states[0])
print(f"output {batch.shape}; largest difference between batch and one sequence:")
print(f"{jnp.abs(batch[0] - one).max():.1e}")
