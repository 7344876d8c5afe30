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
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from dga_jax.choices import WeightName
from dga_jax.model.decoder import Decoder
from dga_jax.model.layers import axis_names, DecoderLayer, SelfAttention, SwiGLU
from pallas_kernels.decode import pack_rows
from pallas_kernels.quantized_product import quantized_product

_DTYPES: dict[WeightName, str] = {"int8": "int8", "fp8": "float8_e4m3fn"}


class QuantizedProjection(nnx.Module):
  """x·W for a weight in 8 bits: `numbers` [T, K], one row for each output, and `scale` [T].

  The numbers are stored transposed, so that the inputs of an output are adjacent in memory.
  """

  def __init__(self, numbers: Shaped[Array, "*layers T K"], scale: Float[Array, "*layers T"]):
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

    def rows(weight: Array) -> Array:
      K = math.prod(weight.shape[layers : layers + inputs])
      return jnp.swapaxes(weight.reshape(*weight.shape[:layers], K, -1), -1, -2)

    @jax.jit  # In one program no float32 copy of a weight exists.
    def pack(weights: list[Array]) -> tuple[Array, Array | None]:
      return pack_rows(jnp.concatenate([rows(weight) for weight in weights], axis=-2), stored)

    stored = _DTYPES[dtype]
    numbers, scale = pack([weight[...] for weight in weights])
    assert scale is not None  # The dtype has 8 bits.
    return cls(numbers, scale)

  def __call__(self, x: Float[Array, "*S K"]) -> Float[Array, "*S T"]:
    """The product in the dtype of x, summed in float32."""
    rows = x.reshape(-1, x.shape[-1])
    out = _product(rows, self.numbers[...], self.scale[...])
    return out.reshape(*x.shape[:-1], out.shape[-1])


@jax.custom_vjp
def _product(x: Array, numbers: Array, scale: Array) -> Array:
  return quantized_product(x, numbers, scale)


def _no_gradient(x: Array, numbers: Array, scale: Array) -> tuple[Array, None]:
  raise ValueError(
    f"the weights are in 8 bits ({numbers.dtype}), which have no gradient; train the model with the"
    " weights of its checkpoint, and quantize the result."
  )


_product.defvjp(_no_gradient, lambda _, gradient: (gradient, None, None))


class QuantizedAttention(SelfAttention):
  """SelfAttention whose projections have weights in 8 bits."""

  def __init__(self, attention: SelfAttention, dtype: WeightName, *, layers: int) -> None:
    weights = ("query", "key", "value", "out")
    for name, value in vars(attention).items():
      if name not in weights and not name.startswith("_"):
        setattr(self, name, value)
    pack = functools.partial(QuantizedProjection.from_weights, dtype=dtype, layers=layers)
    self.qkv = pack([attention.query, attention.key, attention.value], inputs=1)
    self.output = pack([attention.out], inputs=2)

  def project_in(
    self, x_BxLxE: Float[Array, "B L E"]
  ) -> tuple[Float[Array, "B L H D"], Float[Array, "B L N D"], Float[Array, "B L N D"]]:
    """Query, key and value without their biases."""
    H, N, D = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
    qkv = self.qkv(x_BxLxE).reshape(*x_BxLxE.shape[:2], H + 2 * N, D)
    return qkv[:, :, :H], qkv[:, :, H : H + N], qkv[:, :, H + N :]

  def project_out(self, o_BxLxHxD: Float[Array, "B L H D"]) -> Float[Array, "B L E"]:
    """The output projection."""
    return self.output(o_BxLxHxD.reshape(*o_BxLxHxD.shape[:2], -1))


class QuantizedSwiGLU(SwiGLU):
  """SwiGLU whose weights are in 8 bits."""

  def __init__(self, mlp: SwiGLU, dtype: WeightName, *, layers: int) -> None:
    self.dtype = mlp.dtype
    pack = functools.partial(QuantizedProjection.from_weights, dtype=dtype, layers=layers, inputs=1)
    self.gate_up = pack([mlp.gate, mlp.up])
    self.down_projection = pack([mlp.down])

  def __call__(self, x_BxLxE: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
    """The equation of `SwiGLU`, in the compute dtype."""
    gate_BxLxF, up_BxLxF = jnp.split(self.gate_up(x_BxLxE), 2, axis=-1)
    return self.down_projection(jax.nn.silu(gate_BxLxF) * up_BxLxF)


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
  stacked = isinstance(quantized.layers, DecoderLayer)
  for layer in _layers(quantized):
    layer.attention = QuantizedAttention(layer.attention, dtype, layers=int(stacked))
    layer.mlp = QuantizedSwiGLU(layer.mlp, dtype, layers=int(stacked))
  return quantized


def weight_name(model: Decoder) -> WeightName | None:
  """The dtype of the weights of a model from `quantize_weights`; None for another model."""
  attention = _layers(model)[0].attention
  if not isinstance(attention, QuantizedAttention):
    return None
  stored = str(attention.qkv.numbers[...].dtype)
  return next(name for name, dtype in _DTYPES.items() if dtype == stored)


def _layers(model: Decoder) -> list[DecoderLayer]:
  """The layers, or the one module of all stacked layers."""
  layers = model.layers
  return [layers] if isinstance(layers, DecoderLayer) else list(layers)
