"""A decoder layer for one token of each sequence, through kernels that read every weight once."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dga_jax.model.config import ModelConfig
from dga_jax.model.layers import Attend, DecoderLayer, in_use
from dga_jax.model.rope import RopeTable
from dga_jax.model.unembedding import logits
from dga_jax.sharding import current_mesh
from pallas_kernels.few_rows import add_product, few_rows_refusal, gated_product, Norm, products


def serves(layer: DecoderLayer, x_BxLxE: Float[Array, "B L E"]) -> bool:
  """Whether `decode_layer` can take the place of the layer for this input."""
  if x_BxLxE.shape[1] != 1 or current_mesh() is not None:
    return False
  return few_rows_refusal(x_BxLxE[:, 0], *_weights(layer)) is None


def decode_layer(
  layer: DecoderLayer, x_Bx1xE: Float[Array, "B 1 E"], rope: RopeTable, attend: Attend
) -> tuple[Float[Array, "B 1 E"], Any]:
  """What the layer computes, in six kernels."""
  config = layer.attention.config
  B, D = x_Bx1xE.shape[0], config.head_dim
  query, key, value, out, gate, up, down = _weights(layer)
  x_BxE = x_Bx1xE[:, 0]
  projected = products(x_BxE, (query, key, value), _norm(config, layer.attention_norm))
  q_Bx1xHxD, k_Bx1xNxD, v_Bx1xNxD = (x.reshape(B, 1, -1, D) for x in projected)
  o_Bx1xHxD, cache = layer.attention.mix(q_Bx1xHxD, k_Bx1xNxD, v_Bx1xNxD, rope, attend)
  x_BxE = add_product(x_BxE, o_Bx1xHxD.reshape(B, -1), out)
  hidden_BxF = gated_product(x_BxE, gate, up, _norm(config, layer.mlp_norm))
  return add_product(x_BxE, hidden_BxF, down)[:, None], cache


def token_logits(
  states_BxE: Float[Array, "B E"], table_ExV: Float[Array, "E V"]
) -> Float[Array, "B V"]:
  """states · table in float32, by the kernel where it serves."""
  if current_mesh() is not None or few_rows_refusal(states_BxE, table_ExV) is not None:
    return logits(states_BxE, table_ExV)
  (logits_BxV,) = products(states_BxE, (table_ExV,), dtype=jnp.float32)
  return logits_BxV


def _weights(layer: DecoderLayer) -> tuple[Array, ...]:
  """As matrices: query, key, value, out, gate, up, down."""
  attention, mlp, E = layer.attention, layer.mlp, layer.attention.config.embed_dim
  inwards = (attention.query, attention.key, attention.value)
  return (
    *(in_use(x, layer.dtype).reshape(E, -1) for x in inwards),
    in_use(attention.out, layer.dtype).reshape(-1, E),
    *(in_use(x, layer.dtype) for x in (mlp.gate, mlp.up, mlp.down)),
  )


def _norm(config: ModelConfig, norm: nnx.RMSNorm) -> Norm:
  return Norm(jnp.asarray(norm.scale), config.norm_eps)
