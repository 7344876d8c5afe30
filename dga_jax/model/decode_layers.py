"""The decoder's layers for one token of each sequence, in kernels that include elementwise work."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from dga_jax.model.layers import DecoderLayer, gather_weight
from dga_jax.model.rope import RopeTable
from dga_jax.model.run_layers import LayerAttend
from dga_jax.sharding import current_mesh
from pallas_kernels.decode import products


def runs_decode_layers(
  layer: DecoderLayer, x_Bx1xE: Float[Array, "B 1 E"], rope: RopeTable
) -> bool:
  """Whether `decode_layers` should run layers like this one.

  Layers with biases, normalised queries and keys or a selector, and layers on a mesh, whose weights
  the compiler splits, run as whole layers.
  """
  config = layer.attention.config
  if config.qkv_bias or config.qk_norm or config.focal_selector or current_mesh() is not None:
    return False
  return products.has_kernels(x_Bx1xE[:, 0], rope.cos[:, 0], _matrices(layer))


def decode_layers(
  layers: Sequence[DecoderLayer],
  x_Bx1xE: Float[Array, "B 1 E"],
  rope: RopeTable,
  attend: LayerAttend,
  caches: Any,
  layer_index: Callable[[int], Any],
) -> tuple[Float[Array, "B 1 E"], Any]:
  """`run_unstacked` for sequences of one token, if `runs_decode_layers`.

  Beside attention a layer runs four kernels, where RMSNorm, RoPE, SwiGLU and the residual sums
  would be kernels of their own. At one row a small kernel takes as long as to read megabytes of
  weights.
  """
  structures, params = zip(*(nnx.split(layer) for layer in layers), strict=True)
  config = layers[0].attention.config

  @jax.jit  # Traced once, for all layers with the same static part of the index.
  def run_layer(
    params: Any, next_scale_E: Array, state: tuple[Array, Any], caches: Any, index: Any
  ) -> tuple[tuple[Array, Any], Any]:
    layer = nnx.merge(structures[0], params)
    weights, (x_BxE, normed) = _matrices(layer), state
    qkv = products.normed_qkv(
      normed,
      weights.query,
      weights.key,
      weights.value,
      rope.cos[:, 0],
      rope.sin[:, 0],
      epsilon=config.norm_eps,
    )
    heads = (x.reshape(len(x), 1, -1, config.head_dim) for x in qkv)
    o_Bx1xHxD, caches = attend(*heads, caches, index)
    o_BxHD, mlp_scale_E = o_Bx1xHxD.reshape(len(o_Bx1xHxD), -1), _scale(layer.mlp_norm)
    x_BxE, normed = products.add_product(x_BxE, o_BxHD, weights.out, mlp_scale_E)
    inner_BxF = products.normed_swiglu(normed, weights.gate, weights.up, epsilon=config.norm_eps)
    return products.add_product(x_BxE, inner_BxF, weights.down, next_scale_E), caches

  scales = [_scale(layer.attention_norm) for layer in layers]
  state: tuple[Array, Any] = (x_Bx1xE[:, 0], products.norm_input(x_Bx1xE[:, 0], scales[0]))
  # The last layer has no next one. Its norm input is not used.
  for index, next_scale_E in enumerate([*scales[1:], scales[-1]]):
    state, caches = run_layer(params[index], next_scale_E, state, caches, layer_index(index))
  return state[0][:, None], caches


def _matrices(layer: DecoderLayer) -> products.LayerWeights:
  """The layer's weights in the compute dtype, with one axis of inputs and one of outputs."""
  attention, mlp = layer.attention, layer.mlp
  E = attention.config.embed_dim

  def matrix(parameter: nnx.Param[Array], rows: int) -> Array:
    return gather_weight(parameter, attention.dtype).reshape(rows, -1)

  return products.LayerWeights(
    query=matrix(attention.query, E),
    key=matrix(attention.key, E),
    value=matrix(attention.value, E),
    out=matrix(attention.out, attention.config.num_heads * attention.config.head_dim),
    gate=matrix(mlp.gate, E),
    up=matrix(mlp.up, E),
    down=matrix(mlp.down, attention.config.mlp_dim),
  )


def _scale(norm: nnx.RMSNorm) -> Array:
  assert norm.scale is not None  # Every norm of the decoder has a scale.
  return norm.scale[...]
