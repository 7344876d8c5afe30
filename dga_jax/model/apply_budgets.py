"""A model with budgets of its KV heads: its weights in the order in which classes are adjacent."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from dga_jax.head_budgets import HeadBudgets
from dga_jax.model.decoder import Decoder
from dga_jax.model.layers import DecoderLayer
from dga_jax.model.quantized import QuantizedLayer


def apply_budgets(model: Decoder, budgets: HeadBudgets, *, parts: int = 1) -> Decoder:
  """The model with attention="head_budgets", and the KV heads of every setting side by side.

  Attention is the same for any order of heads if query, key, value and output weights are permuted
  alike. So heads are permuted once, here, and no layer gathers them. The config of the result holds
  the permuted assignment, which is the one for the result's own weights. Therefore budgets are
  applied once: a model that has budgets is refused.

  Args:
    model: with stacked layers, on one device or on a mesh. Its head order is that of `budgets`.
    budgets: for its layers and KV heads.
    parts: devices over which tensor parallelism will split the heads. Every part of the heads gets
      its share of every setting; see `HeadBudgets.contiguous_order`.

  Returns:
    A new model. The parameters that do not depend on the order of heads are shared.

  Raises:
    ValueError: the budgets do not fit the model, the model has budgets or gates, parts does not
      divide its KV heads, its layers are unstacked, or its weights are in 8 bits.
  """
  if not isinstance(model.layers, DecoderLayer):
    raise ValueError(
      "model has unstacked layers; call apply_budgets before Decoder.unstack_layers."
    )
  if isinstance(model.layers, QuantizedLayer):
    raise ValueError("model has weights in 8 bits; call apply_budgets before quantize_weights.")
  if model.config.head_budgets is not None:
    raise ValueError(
      "model has head budgets already, and its heads are in their order. Apply budgets to the "
      'model from before any budgets were applied: load(..., attention="dense"), or '
      "load(..., budgets=...)."
    )
  if model.config.head_gates:
    raise ValueError(
      "model has a gate for each KV head. Apply budgets to the model that the gates were trained "
      "for (config.init_from), without gates."
    )
  # The new config checks that the budgets fit the model.
  dataclasses.replace(model.config, head_budgets=budgets)
  order = budgets.contiguous_order(parts)
  config = dataclasses.replace(
    model.config, attention="head_budgets", head_budgets=budgets.permute_kv_heads(order)
  )
  kv_heads_LxN = np.array(order)
  ratio = config.num_heads // config.num_kv_heads
  heads_LxH = (kv_heads_LxN[..., None] * ratio + np.arange(ratio)).reshape(len(order), -1)
  indices = {"kv_heads": kv_heads_LxN, "heads": heads_LxH}

  def permute(parameter: Any) -> Any:
    names = parameter.get_metadata()["out_sharding"]
    for name, index in indices.items():
      if name in names:
        value = _take_in_layers(parameter[...], index, names.index(name))
        return parameter.replace(value)
    return parameter

  state = nnx.state(model, nnx.Param)
  flat = [(path, permute(parameter)) for path, parameter in nnx.to_flat_state(state)]
  structure = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
  permuted: Decoder = nnx.merge(structure, nnx.from_flat_state(flat))
  return permuted


def _take_in_layers(stacked: Array, index: np.ndarray, axis: int) -> Array:
  """Entries of each layer in an order of their own.

  Args:
    stacked: parameters with a leading axis of layers.
    index: [layers, entries].
    axis: of the entries.
  """
  shape = [1] * stacked.ndim
  shape[0], shape[axis] = index.shape
  return jnp.take_along_axis(stacked, index.reshape(shape), axis=axis)
