"""Flax NNX: DGA inside `nnx.MultiHeadAttention`, with rows padded at the left.

Command: `python docs/examples/flax_nnx.py`
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dga_jax import DGAConfig
from dga_jax.flax import attention_fn

config = DGAConfig(selection="streaming", group_size=14, focal_per_block=2)
layer = nnx.MultiHeadAttention(
  num_heads=8,
  num_kv_heads=2,
  in_features=128,
  decode=False,
  rngs=nnx.Rngs(0),
  attention_fn=attention_fn(config),
)

# Two texts of 512 and 300 tokens; the second one is padded at the left.
states = jax.random.normal(jax.random.key(0), (2, 512, 128))
is_token = jnp.arange(512)[None] >= jnp.array([[0], [212]])
mask = is_token[:, None, None]  # [batch, 1, 1, length]


@nnx.jit
def attend(layer: nnx.MultiHeadAttention, states: jax.Array, mask: jax.Array) -> jax.Array:
  """Attention of the layer."""
  return layer(states, mask=mask, is_causal=True)


out = attend(layer, states, mask)
alone = attend(layer, states[1:, 212:], mask[1:, :, :, 212:])  # The short text without padding.
print(f"output {out.shape}; largest difference to the text alone:")
print(f"{jnp.abs(out[1, 212:] - alone[0]).max():.1e}")
