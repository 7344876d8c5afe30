"""Queries, keys and values of the layers of a decoder."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Int

from benchmarks._forward import chunked_causal_attention, embed, run_layers
from dga_jax.model import Decoder


def attention_inputs(
  model: Decoder, tokens_L: Int[np.ndarray, "L"], layers: Sequence[int]
) -> dict[str, np.ndarray]:
  """Query [L, H, D], key and value [L, N, D] in float16, the heads of the layers side by side."""
  graphdef, params = nnx.split(model)

  def attend(
    q: Array, k: Array, v: Array, caches: object, layer: Array
  ) -> tuple[Array, tuple[Array, Array, Array]]:
    del caches, layer
    return chunked_causal_attention(q, k, v), (q[0], k[0], v[0])

  @jax.jit
  def run(params: nnx.State) -> tuple[Array, ...]:
    decoder = nnx.merge(graphdef, params)
    _, by_layer = run_layers(decoder, embed(decoder, jnp.asarray(tokens_L)[None]), attend)
    # [layers, L, heads, D] -> [L, heads of all layers, D]
    chosen = jax.tree.map(lambda x: jnp.concatenate([x[i] for i in layers], axis=1), by_layer)
    return tuple(x.astype(jnp.float16) for x in chosen)

  return dict(zip(("query", "key", "value"), map(np.asarray, run(params)), strict=True))
