"""The weights of a decoder as the programs of generation read them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from dga_jax.model import Decoder, weight_name
from dga_jax.sharding import current_rules, partition_spec


def compute_weights(model: Decoder, mesh: Mesh | None = None) -> nnx.State:
  """The weights in the dtype of the products, with arrays of their own for every layer.

  Engines of several attention kinds can share them, if the decoders have the same parameters.

  Args:
    model: the decoder.
    mesh: devices that share the weights by `ShardingRules`; None for one device.

  Raises:
    ValueError: a weight that overflows the dtype of the products, or weights in 8 bits on a mesh.
  """
  if mesh is not None and (name := weight_name(model)) is not None:
    raise ValueError(
      f"the weights are in 8 bits ({name}), which one device holds, but there is a mesh; give a"
      " mesh or weights in 8 bits."
    )
  # Cast before the layers are unstacked, since unstacking copies the weights.
  graphdef, params = nnx.split(model)
  model = nnx.merge(graphdef, in_compute_dtype(params, model.config.dtype)).unstack_layers()
  params = nnx.state(model)
  return params if mesh is None else _put(params, mesh)


def fits_weights(model: Decoder, weights: nnx.State) -> bool:
  """Whether `weights`, from `compute_weights`, has the parameters of a decoder."""
  return _shapes(_unstack_abstractly(model)[1]) == _shapes(weights)


def unstacked_structure(model: Decoder, weights: nnx.State) -> Any:
  """The graphdef that makes a decoder like `model` of `compute_weights`.

  Raises:
    ValueError: the weights are those of another decoder.
  """
  if not fits_weights(model, weights):
    raise ValueError(
      "weights has other parameters than the model; use compute_weights of a model with the same"
      " parameters, or None."
    )
  return _unstack_abstractly(model)[0]


def _unstack_abstractly(model: Decoder) -> tuple[Any, Any]:
  """The graphdef of the decoder with unstacked layers, and the shapes of its parameters."""
  graphdef, params = nnx.split(model)
  found = []

  def unstack(params: Any) -> Any:
    structure, unstacked = nnx.split(nnx.merge(graphdef, params).unstack_layers())
    found.append(structure)
    return unstacked

  shapes = jax.eval_shape(unstack, params)
  return found[0], shapes


def _shapes(params: Any) -> Any:
  return [(path, x.shape) for path, x in jax.tree.leaves_with_path(nnx.to_pure_dict(params))]


def _put(params: nnx.State, mesh: Mesh) -> nnx.State:
  """The weights of a decoder with unstacked layers on a mesh, by the rules for parameters."""
  rules = current_rules().parameters

  def put(names: PartitionSpec, x: Array) -> Array:
    # An unstacked weight has no axis of layers, but its metadata still names one.
    spec = partition_spec(tuple(names)[len(names) - x.ndim :], x.shape, mesh, rules)
    return jax.device_put(x, NamedSharding(mesh, spec))

  placed = jax.tree.map(
    put,
    nnx.to_pure_dict(nnx.get_partition_spec(params)),
    nnx.to_pure_dict(params),
    is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
  )
  nnx.replace_by_pure_dict(params, placed)
  return params


def in_compute_dtype(params: Any, dtype: str) -> Any:
  """Casts the weights to the dtype of the products, once.

  Norms compute in float32, and weights in 8 bits keep their dtype.

  Raises:
    ValueError: a weight that is too large for the dtype, which only float16 can cause.
  """

  def cast(path: tuple[Any, ...], x: Array) -> Float[Array, "..."]:
    name = jax.tree_util.keystr(path)
    if "scale" in name or x.dtype.itemsize == 1:
      return x
    narrow = x.astype(dtype)
    if dtype == "float16" and bool((jnp.isinf(narrow) & jnp.isfinite(x)).any()):
      raise ValueError(
        f"dtype is 'float16', whose largest number is 65504, but the parameter {name} contains"
        f" {float(jnp.abs(x).max()):g}; use dtype 'bfloat16' or 'float32'."
      )
    return narrow

  return jax.tree_util.tree_map_with_path(cast, params)
