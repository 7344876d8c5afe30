"""Shapes of known models, and random parameters of a decoder."""

import functools
from typing import Any

import jax
from jax import Array

# Arguments of ModelConfig.
SMOLLM2_135M: dict[str, Any] = {
  "vocab_size": 49152,
  "num_layers": 30,
  "embed_dim": 576,
  "num_heads": 9,
  "num_kv_heads": 3,
  "head_dim": 64,
  "mlp_dim": 1536,
}
LLAMA2_7B: dict[str, Any] = {
  "vocab_size": 32000,
  "num_layers": 32,
  "embed_dim": 4096,
  "num_heads": 32,
  "num_kv_heads": 32,
  "head_dim": 128,
  "mlp_dim": 11008,
}


def random_params(abstract: Any) -> Any:
  """Parameters, normal with standard deviation 0.02, of the shapes and dtypes of a pytree."""

  @functools.partial(jax.jit, static_argnums=(1, 2))  # Compiles once for each shape.
  def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return 0.02 * jax.random.normal(key, shape, dtype)

  leaves, tree = jax.tree.flatten(abstract)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  drawn = [draw(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
  return jax.block_until_ready(jax.tree.unflatten(tree, drawn))
