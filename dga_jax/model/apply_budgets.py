"""A model with budgets of its KV heads: its weights in the order in which classes are adjacent."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Shaped

from dga_jax.choices import AttentionName
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
  return _with_order(model, budgets, budgets.contiguous_order(parts))


def arrange_heads(model: Decoder, budgets: HeadBudgets, *, parts: int = 1) -> Decoder:
  """The model with its KV heads in the order for `parts` devices; the attention kind stays.

  A model that was trained on a mesh has its heads in the order for that mesh. On one device each
  layer would slice and join the heads of every setting.

  Args:
    model: with stacked layers.
    budgets: in the order of the model's heads.
    parts: as for `apply_budgets`.

  Returns:
    A model of the same function with the permuted budgets in its config.
  """
  return _with_order(
    model, budgets, budgets.contiguous_order(parts), attention=model.config.attention
  )


def permute_kv_heads(
  stacked: Shaped[Array, "layers ..."],
  names: Sequence[str | None],
  order: Sequence[Sequence[int]],
  *,
  heads_per_kv: int,
) -> Shaped[Array, "layers ..."]:
  """A parameter of stacked layers with its heads in another order; query heads follow KV heads.

  Args:
    stacked: the parameter of all layers, or an array of its shape.
    names: the logical name of each axis. Without "kv_heads" and "heads" the result is `stacked`.
    order: [layers][kv_heads], the present head at each place of the new order.
    heads_per_kv: query heads of a KV head.
  """
  kv_heads_LxN = np.array(order)
  heads_LxH = (kv_heads_LxN[..., None] * heads_per_kv + np.arange(heads_per_kv)).reshape(
    len(order), -1
  )
  for name, index in {"kv_heads": kv_heads_LxN, "heads": heads_LxH}.items():
    if name in names:
      return _take_in_layers(stacked, index, list(names).index(name))
  return stacked


def _with_order(
  model: Decoder,
  budgets: HeadBudgets,
  order: Sequence[Sequence[int]],
  attention: AttentionName = "head_budgets",
) -> Decoder:
  """A model with these budgets, whose KV heads and budgets are then put into an order."""
  config = dataclasses.replace(
    model.config, attention=attention, head_budgets=budgets.permute_kv_heads(order)
  )
  ratio = config.num_heads // config.num_kv_heads

  def permute(parameter: Any) -> Any:
    value, names = parameter[...], parameter.get_metadata()["out_sharding"]
    permuted = permute_kv_heads(value, names, order, heads_per_kv=ratio)
    return parameter if permuted is value else parameter.replace(permuted)

  state = nnx.state(model, nnx.Param)
  if any(tuple(row) != tuple(range(len(row))) for row in order):
    flat = [(path, permute(parameter)) for path, parameter in nnx.to_flat_state(state)]
    state = nnx.from_flat_state(flat)
  structure = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
  permuted: Decoder = nnx.merge(structure, state)
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

  def take(x: Array) -> Array:
    return jnp.take_along_axis(x, index.reshape(shape), axis=axis)

  if not isinstance(stacked, jax.Array) or isinstance(stacked, jax.core.Tracer):
    return take(stacked)
  # Without out_shardings every device of a mesh would receive all heads.
  taken: Array = jax.jit(take, out_shardings=stacked.sharding)(stacked)
  return taken
