"""The order of KV heads in a run with head budgets.

Tensor parallelism gives each device adjacent KV heads. A run orders the heads so that every device
of the mesh axis "tensor" has its share of every setting. A run that continues on another mesh
reorders the heads of its parameters and of the optimizer's moments.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array

from dga_jax.checkpoint import abstract_decoder
from dga_jax.head_budgets import HeadBudgets, read_head_budgets
from dga_jax.model.apply_budgets import permute_kv_heads
from dga_jax.model.config import ModelConfig
from dga_jax.sharding import MESH_AXES
from train.config import TrainConfig
from train.optimizer import make_optimizer
from train.step import Functions, TrainState


def given_budgets(config: TrainConfig) -> HeadBudgets | None:
  """The budgets that a run is given, in the order of heads of the model in `config.init_from`.

  None without budgets, and for random parameters with the budgets of config.model, whose order the
  run keeps.

  Raises:
    OSError: the file of `config.budgets` cannot be read.
    ValueError: it does not contain budgets.
  """
  if config.budgets is not None:
    return read_head_budgets(config.budgets)
  if config.init_from is None or config.model.attention != "head_budgets":
    return None
  return config.model.head_budgets


def tensor_parts(config: TrainConfig, devices: int, budgets: HeadBudgets) -> int:
  """The number of devices that split the KV heads.

  Raises:
    ValueError: the mesh does not fit the devices, or its axis "tensor" does not divide the KV heads
      of the budgets.
  """
  parts = config.mesh.sizes(devices)[MESH_AXES.index("tensor")]
  if budgets.num_kv_heads % parts:
    raise ValueError(
      f"config.mesh.tensor is {parts}; it must divide the {budgets.num_kv_heads} KV heads of a "
      "layer of the head budgets. Split heads over fewer devices, and rows (data, fsdp) or "
      "sequences (context) over the others."
    )
  return parts


def saved_in_order(
  saved: Mapping[str, Any], config: TrainConfig, devices: int
) -> Mapping[str, Any]:
  """The config of a checkpoint, with its head budgets in the order of heads of this mesh.

  Args:
    saved: the config in the run's checkpoint.
    config: of the run.
    devices: their number.
  """
  if given_budgets(config) is None or saved["model"].get("head_budgets") is None:
    return saved
  budgets = HeadBudgets.from_dict(saved["model"]["head_budgets"])
  there = budgets.arranged(tensor_parts(config, devices, budgets)).to_dict()
  return {**saved, "model": {**saved["model"], "head_budgets": there}}


def reorder_heads(
  state: TrainState, saved: Mapping[str, Any], config: TrainConfig, functions: Functions
) -> TrainState:
  """The state of a checkpoint with the KV heads in the order of `config.model.head_budgets`.

  Args:
    state: from the checkpoint; donated if its heads are in another order.
    saved: the config in the checkpoint.
    config: of the run, whose budgets are in the order for its mesh.
    functions: of the run.
  """
  budgets = ModelConfig.from_dict(saved["model"]).head_budgets
  if budgets is None or budgets == config.model.head_budgets:
    return state
  order = budgets.contiguous_order(functions.mesh.shape["tensor"])
  assert budgets.permute_kv_heads(order) == config.model.head_budgets  # See `saved_in_order`.
  _, variables = abstract_decoder(config.model)
  names = nnx.to_pure_dict(nnx.get_partition_spec(variables))
  ratio = config.model.num_heads // config.model.num_kv_heads

  def permute(x: Array, names: PartitionSpec) -> Array:
    return permute_kv_heads(x, tuple(names), order, heads_per_kv=ratio)

  def run(state: TrainState) -> TrainState:
    moments = optax.tree_map_params(
      make_optimizer(config, variables), permute, state.optimizer, names
    )
    return dataclasses.replace(
      state, params=jax.tree.map(permute, state.params, names), optimizer=moments
    )

  reordered: TrainState = jax.jit(run, donate_argnums=0, out_shardings=functions.shardings)(state)
  return reordered
