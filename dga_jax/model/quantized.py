"""A decoder whose projections have weights in 8 bits, for generation and evaluation.

Each output channel t of a weight W has a float32 scale s_t = max_k |W_kt| / q, with q = 127 (int8)
or 448 (float8_e4m3fn), and the numbers W_kt / s_t, rounded to the nearest number of the type. The
products of query, key, value, output, gate, up and down take such weights. The embedding table, the
unembedding, norms, biases and the selector keep their dtype: they are a small part of the bytes
that a token reads, and the unembedding decides the token.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from dga_jax.choices import WeightName
from dga_jax.model.decoder import Decoder
from dga_jax.model.layers import Attend, axis_names, DecoderLayer
from dga_jax.model.rope import RopeTable
from pallas_kernels.decode import pack_rows
from pallas_kernels.quantized_product import quantized_product

_DTYPES: dict[WeightName, str] = {"int8": "int8", "fp8": "float8_e4m3fn"}


class QuantizedProjection(nnx.Module):
  """x·W for a weight in 8 bits: `numbers` [T, K] and `scale` [T].

  The numbers are stored transposed: the inputs of an output are adjacent in memory.
  """

  def __init__(
    self, numbers: Shaped[Array, "*layers T K"], scale: Float[Array, "*layers T"]
  ) -> None:
    layers = ("layers",) * (scale.ndim - 1)
    self.numbers = nnx.Param(numbers, **axis_names(*layers, "outputs", "inputs"))
    self.scale = nnx.Param(scale, **axis_names(*layers, "outputs"))

  @classmethod
  def from_weights(
    cls, weights: Sequence[nnx.Param[Array]], dtype: WeightName, *, inputs: int, layers: int
  ) -> Self:
    """Weights of the same inputs, side by side.

    Args:
      weights: [layers..., inputs..., outputs...].
      dtype: of the numbers.
      inputs: axes that the product sums over.
      layers: 1 if the weights of all layers are stacked, else 0.
    """
    numbers, scale = _pack([weight[...] for weight in weights], _DTYPES[dtype], inputs, layers)
    return cls(numbers, scale)

  def __call__(
    self,
    x: Float[Array, "*S K"],
    *,
    norm: nnx.RMSNorm | None = None,
    swiglu: bool = False,
    residual: Float[Array, "*S U"] | None = None,
  ) -> Float[Array, "*S U"]:
    """The product and the operations of a layer around it, see `quantized_product`.

    Args:
      x: inputs.
      norm: RMSNorm of the inputs; None for none.
      swiglu: whether the outputs are gates and values of SwiGLU.
      residual: added to the result; None for no sum.
    """
    rows = None if residual is None else residual.reshape(-1, residual.shape[-1])
    norm_scale: Any = None if norm is None else norm.scale  # Flax allows a norm without a scale.
    operands = (
      x.reshape(-1, x.shape[-1]),
      self.numbers[...],
      self.scale[...],
      None if norm is None else norm_scale[...],
      rows,
    )
    out = _product(0.0 if norm is None else norm.epsilon, swiglu, *operands)
    return out.reshape(*x.shape[:-1], out.shape[-1])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # No float32 copy of a weight exists.
def _pack(weights: list[Array], stored: str, inputs: int, layers: int) -> tuple[Array, Array]:
  """Numbers and scales of weights side by side; see `QuantizedProjection.from_weights`."""
  rows = []
  for weight in weights:
    K = math.prod(weight.shape[layers : layers + inputs])
    rows.append(jnp.swapaxes(weight.reshape(*weight.shape[:layers], K, -1), -1, -2))
  numbers, scale = pack_rows(jnp.concatenate(rows, axis=-2), stored)
  assert scale is not None  # The dtype has 8 bits.
  return numbers, scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
  epsilon: float,
  swiglu: bool,
  x: Array,
  numbers: Array,
  scale: Array,
  norm_scale: Array | None,
  residual: Array | None,
) -> Array:
  return quantized_product(
    x,
    numbers,
    scale,
    norm_scale=norm_scale,
    epsilon=epsilon,
    swiglu=swiglu,
    residual=residual,
  )


def _no_gradient(epsilon: float, swiglu: bool, x: Array, numbers: Array, *_: Any) -> Any:
  raise ValueError(
    f"the weights are in 8 bits ({numbers.dtype}), which have no gradient; train the model with the"
    " weights of its checkpoint, and quantize the result."
  )


_product.defvjp(_no_gradient, _no_gradient)


class QuantizedLayer(DecoderLayer):
  """A decoder layer whose projections have weights in 8 bits.

  Attributes:
    attention: without the weights of its projections.
  """

  def __init__(self, layer: DecoderLayer, dtype: WeightName, *, layers: int) -> None:
    attention, mlp = layer.attention, layer.mlp
    pack = functools.partial(QuantizedProjection.from_weights, dtype=dtype, layers=layers)
    self.dtype = layer.dtype
    self.attention_norm, self.mlp_norm = layer.attention_norm, layer.mlp_norm
    self.qkv = pack([attention.query, attention.key, attention.value], inputs=1)
    self.out = pack([attention.out], inputs=2)
    self.gate_up = pack([mlp.gate, mlp.up], inputs=1)
    self.down = pack([mlp.down], inputs=1)
    for name in ("query", "key", "value", "out"):
      delattr(attention, name)
    self.attention = attention

  def __call__(
    self, x_BxLxE: Float[Array, "B L E"], rope: RopeTable, attend: Attend
  ) -> tuple[Float[Array, "B L E"], Any]:
    """See `DecoderLayer`."""
    (B, L, _), config = x_BxLxE.shape, self.attention.config
    H, N, D = config.num_heads, config.num_kv_heads, config.head_dim
    qkv = self.qkv(x_BxLxE, norm=self.attention_norm).reshape(B, L, H + 2 * N, D)
    q_BxLxHxD, k_BxLxNxD, v_BxLxNxD = jnp.split(qkv, (H, H + N), axis=2)
    o_BxLxHxD, cache = self.attention.mix(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, rope, attend)
    x_BxLxE = self.out(o_BxLxHxD.reshape(B, L, H * D), residual=x_BxLxE)
    inner_BxLxF = self.gate_up(x_BxLxE, norm=self.mlp_norm, swiglu=True)
    return self.down(inner_BxLxF, residual=x_BxLxE), cache

  def with_update(
    self,
    x_BxLxE: Float[Array, "B L E"],
    update_BxLxE: Float[Array, "B L E"] | None,
    rope: RopeTable,
    attend: Attend,
  ) -> tuple[Float[Array, "B L E"], Float[Array, "B L E"] | None, Any]:
    """See `DecoderLayer`. The products include the sums, so no update is left."""
    x_BxLxE = x_BxLxE if update_BxLxE is None else x_BxLxE + update_BxLxE
    x_BxLxE, cache = self(x_BxLxE, rope, attend)
    return x_BxLxE, None, cache


def quantize_weights(model: Decoder, dtype: WeightName) -> Decoder:
  """The decoder with the weights of its projections in 8 bits, for one device.

  Products of at most 16 rows, as in decoding, read the weights in 8 bits on GPUs. Longer inputs are
  multiplied with a copy in the compute dtype, one layer after another.

  Args:
    model: a decoder, with stacked or unstacked layers. Apply budgets of KV heads before.
    dtype: "int8" or "fp8" (float8_e4m3fn).

  Returns:
    A new decoder, which has no gradient. The parameters that are not quantized are shared.

  Raises:
    ValueError: the weights are in 8 bits already, or the dtype is unknown.
  """
  if dtype not in _DTYPES:
    raise ValueError(f"weights is {dtype!r}; it must be one of {tuple(_DTYPES)}.")
  if (found := weight_name(model)) is not None:
    raise ValueError(
      f"the model has weights in 8 bits ({found}) already; quantize the model from before."
    )
  quantized: Decoder = nnx.merge(*nnx.split(model))
  layers = quantized.layers
  if isinstance(layers, DecoderLayer):
    quantized.layers = QuantizedLayer(layers, dtype, layers=1)
  else:
    quantized.layers = nnx.List([QuantizedLayer(layer, dtype, layers=0) for layer in layers])
  return quantized


def weight_name(model: Decoder) -> WeightName | None:
  """The dtype of the weights of a model from `quantize_weights`; None for another model."""
  layers = model.layers
  layer = layers if isinstance(layers, DecoderLayer) else layers[0]
  if not isinstance(layer, QuantizedLayer):
    return None
  stored = str(layer.qkv.numbers[...].dtype)
  return next(name for name, dtype in _DTYPES.items() if dtype == stored)
