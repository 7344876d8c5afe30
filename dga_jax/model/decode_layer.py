"""A decoder layer for one token of each sequence: products that include the elementwise work."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from dga_jax.model.layers import Attend, DecoderLayer, gather_weight
from dga_jax.model.rope import RopeTable
from dga_jax.sharding import current_mesh
from pallas_kernels.decode.products import add_product, normed_qkv, normed_swiglu


def decode_layer(
  layer: DecoderLayer, x_Bx1xE: Float[Array, "B 1 E"], rope: RopeTable, attend: Attend
) -> tuple[Float[Array, "B 1 E"], Any]:
  """`DecoderLayer.__call__` for sequences of one token.

  On a GPU a layer runs five kernels, where RMSNorm, RoPE, SwiGLU and the residual sums would be
  kernels of their own. At one row a kernel takes as long to start as to read megabytes of weights.
  Layers with biases, normalised queries and keys or a selector, and layers on a mesh, whose weights
  the compiler splits, run `DecoderLayer.__call__`.
  """
  attention, mlp = layer.attention, layer.mlp
  config, dtype = attention.config, attention.dtype
  if config.qkv_bias or config.qk_norm or config.focal_selector or current_mesh() is not None:
    return layer(x_Bx1xE, rope, attend)
  x_BxE = x_Bx1xE[:, 0]
  B, E = x_BxE.shape

  def matrix(parameter: nnx.Param[Array], *shape: int) -> Array:
    return gather_weight(parameter, dtype).reshape(shape)

  q_BxHD, k_BxND, v_BxND = normed_qkv(
    x_BxE,
    _scale(layer.attention_norm),
    matrix(attention.query, E, -1),
    matrix(attention.key, E, -1),
    matrix(attention.value, E, -1),
    rope.cos[:, 0],
    rope.sin[:, 0],
    epsilon=config.norm_eps,
  )
  heads = (x.reshape(B, 1, -1, config.head_dim) for x in (q_BxHD, k_BxND, v_BxND))
  o_Bx1xHxD, cache = attend(*heads)
  x_BxE = add_product(x_BxE, o_Bx1xHxD.reshape(B, -1), matrix(attention.out, -1, E))
  inner_BxF = normed_swiglu(
    x_BxE,
    _scale(layer.mlp_norm),
    gather_weight(mlp.gate, dtype),
    gather_weight(mlp.up, dtype),
    epsilon=config.norm_eps,
  )
  x_BxE = add_product(x_BxE, inner_BxF, gather_weight(mlp.down, dtype))
  return x_BxE[:, None], cache


def _scale(norm: nnx.RMSNorm) -> Array:
  assert norm.scale is not None  # Every norm of the decoder has a scale.
  return norm.scale[...]
