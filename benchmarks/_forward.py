"""Forward passes of benchmarks whose attention the caller defines, and greedy decoding."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from dga_jax.attention.dense import xla_attention
from dga_jax.model import Decoder
from dga_jax.model.decoder import DecoderCache
from dga_jax.model.layers import DecoderLayer
from dga_jax.model.rope import rope_table
from dga_jax.model.run_layers import LayerAttend, run_stacked


def embed(model: Decoder, tokens_BxL: Int[Array, "B L"]) -> Float[Array, "B L E"]:
  """The input of the first layer."""
  return model.embedding[...][tokens_BxL].astype(model.config.dtype)


def run_layers(
  model: Decoder, x_BxLxE: Float[Array, "B L E"], attend: LayerAttend
) -> tuple[Float[Array, "B L E"], Any]:
  """The normalised output of the last layer, and the second results of `attend` by layer.

  Args:
    model: with stacked layers.
    x_BxLxE: the input of the first layer.
    attend: called with query, key, value, None and the layer's index.
  """
  config, (B, L) = model.config, x_BxLxE.shape[:2]
  positions_BxL = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
  rope = rope_table(positions_BxL, config.rope_frequencies())
  assert isinstance(model.layers, DecoderLayer)  # The layers are stacked.
  x_BxLxE, by_layer = run_stacked(
    model.layers, x_BxLxE, rope, attend, None, num_layers=config.num_layers, remat="none"
  )
  return model.norm(x_BxLxE).astype(config.dtype), by_layer


def chunked_causal_attention(
  q_BxLxHxD: Float[Array, "B L H D"],
  k_BxLxNxD: Float[Array, "B L N D"],
  v_BxLxNxD: Float[Array, "B L N D"],
  chunk: int = 512,
) -> Float[Array, "B L H D"]:
  """Causal attention with the weights of `chunk` queries in memory, over the keys before them."""
  L = q_BxLxHxD.shape[1]
  outputs = []
  for start in range(0, L, chunk):
    end = min(start + chunk, L)
    seen_bxS = jnp.arange(end)[None, :] <= jnp.arange(start, end)[:, None]
    outputs.append(
      xla_attention(
        q_BxLxHxD[:, start:end], k_BxLxNxD[:, :end], v_BxLxNxD[:, :end], mask=seen_bxS[None, None]
      )
    )
  return jnp.concatenate(outputs, axis=1)


def relative_noise(key: Array, x: Float[Array, "*S"], size: Array) -> Float[Array, "*S"]:
  """Gaussian noise with a standard deviation of `size` times the root mean square of `x`."""
  deviation = size * jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
  return (deviation * jax.random.normal(key, x.shape)).astype(x.dtype)


def greedy_steps(
  model: Decoder, token_B: Int[Array, "B"], cache: DecoderCache, count: int
) -> Int[Array, "T B"]:
  """The `count` most likely tokens of each sequence after `token_B`, one after another.

  Args:
    model: the decoder.
    token_B: follows the tokens of the cache.
    cache: of the sequences.
    count: T.
  """

  def step(carry: tuple[DecoderCache, Array], _: None) -> tuple[tuple[DecoderCache, Array], Array]:
    cache, token_B = carry
    logits_BxV, cache = model.decode(token_B, cache)
    token_B = logits_BxV.argmax(axis=-1).astype(jnp.int32)
    return (cache, token_B), token_B

  tokens_TxB: Array = jax.lax.scan(step, (cache, token_B), None, length=count)[1]
  return tokens_TxB
