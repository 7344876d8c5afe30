"""Flax Linen: the op between the projections of a module of your own.

Command: `python docs/examples/flax_linen.py`
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dga_jax import DGAConfig, dynamic_group_attention


class SelfAttention(nn.Module):
  """Causal self-attention with 8 query heads and 2 KV heads."""

  config: DGAConfig
  head_dim: int = 32

  @nn.compact
  def __call__(self, states: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Attends; lengths are the tokens of right-padded rows."""
    query, key, value = (
      nn.DenseGeneral((heads, self.head_dim), use_bias=False, name=name)(states)
      for name, heads in (("query", 8), ("key", 2), ("value", 2))
    )
    out = dynamic_group_attention(query, key, value, config=self.config, lengths=lengths)
    return nn.DenseGeneral(states.shape[-1], axis=(-2, -1), use_bias=False, name="out")(out)


module = SelfAttention(DGAConfig(selection="streaming", group_size=14, focal_per_block=2))
states = jax.random.normal(jax.random.key(0), (2, 512, 128))
lengths = jnp.array([512, 300])
params = jax.jit(module.init)(jax.random.key(1), states, lengths)


@jax.jit
def loss(params: dict, states: jax.Array, lengths: jax.Array) -> jax.Array:
  """A number to differentiate."""
  return jnp.mean(module.apply(params, states, lengths) ** 2)


gradient = jax.grad(loss)(params, states, lengths)
shapes = jax.tree.map(jnp.shape, gradient["params"])
print(f"loss {loss(params, states, lengths):.4f}, gradient of {sorted(shapes)}")
