"""Training that begins with the model of a checkpoint: of an import or of another run."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from dga_jax.checkpoint import load_config, load_model, load_model_config, load_tokenizer
from dga_jax.checkpoint_files import existing_step
from dga_jax.config_dataclasses import field_names
from dga_jax.head_budgets import HeadBudgets
from dga_jax.model import Decoder, ModelConfig
from dga_jax.model.apply_budgets import apply_budgets, arrange_heads
from dga_jax.model.config import ATTENTION_SETTINGS
from dga_jax.tokenizer import Tokenizer
from train.config import TrainConfig
from train.gates import GATES, initial_gates
from train.head_order import given_budgets, tensor_parts

# Fields that the training config decides; the checkpoint decides the others, which define the
# weights and RoPE.
_OWN_FIELDS = frozenset(
  {"attention", *ATTENTION_SETTINGS, "head_gates", "dtype", "param_dtype", "remat", "unroll_layers"}
)

# Entry of a checkpoint's config: what an import knows of the model besides, for an export.
ORIGIN = "origin"


@dataclasses.dataclass(frozen=True)
class Initial:
  """What a run takes over from the checkpoint that training begins with.

  Attributes:
    config: the training config with that checkpoint's model; attention, its settings, gates,
      dtypes, remat and unroll_layers stay those of the config, and `rope_base` where it is given.
    budgets: head budgets that the run is given, in the order of heads of that checkpoint; None
      without budgets. `config.model.head_budgets` has the order for the mesh.
    tokenizer: the checkpoint's, or None where training begins with nothing.
    entries: further entries for the config in the run's own checkpoints.
  """

  config: TrainConfig
  budgets: HeadBudgets | None = None
  tokenizer: Tokenizer | None = None
  entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def find_initial(
  config: TrainConfig, workdir: str | None, step: int | None = None, *, devices: int | None = None
) -> Initial:
  """Reads everything but the parameters.

  Args:
    config: of the run.
    workdir: the folder with the checkpoint: `config.init_from`, or the run's own folder once it has
      checkpoints. Not read where `config.init_from` is None.
    step: which checkpoint; None for the newest.
    devices: number of devices of the run's mesh; None for all devices of this program.

  Raises:
    CheckpointError: there is no checkpoint, or a damaged one.
    OSError: the file of `config.budgets` cannot be read.
    ValueError: the budgets do not fit the model or the mesh, or gates have no model.
  """
  if config.model.head_gates and config.init_from is None:
    raise ValueError(
      "config.init_from is None; it must be a folder with a model, since config.model.head_gates "
      "chooses full heads among those of a given model."
    )
  budgets = given_budgets(config)
  attention: dict[str, Any] = {}
  if budgets is not None:
    parts = tensor_parts(config, jax.device_count() if devices is None else devices, budgets)
    attention = {"attention": "head_budgets", "head_budgets": budgets.arranged(parts)}
  if config.init_from is None or workdir is None:
    model = dataclasses.replace(config.model, **attention)
    return Initial(dataclasses.replace(config, model=model), budgets)
  step = existing_step(workdir, step)
  saved, stored = load_config(workdir, step), load_model_config(workdir, step)
  own = {name: getattr(config.model, name) for name in _OWN_FIELDS} | attention
  if config.rope_base is not None:
    own["rope_base"] = config.rope_base
  _log_replaced(config.model, stored, own, workdir)
  model = dataclasses.replace(stored, **own)
  entries = {ORIGIN: saved[ORIGIN]} if ORIGIN in saved else {}
  config = dataclasses.replace(config, model=model)
  return Initial(config, budgets, load_tokenizer(workdir, step), entries)


def _log_replaced(
  given: ModelConfig, stored: ModelConfig, own: Collection[str], workdir: str
) -> None:
  """Logs the fields that the checkpoint decides and for which the config has another value."""
  # `train.config.make_config` sets focal_selector.
  decided = set(field_names(ModelConfig)).difference(own, {"focal_selector"})
  replaced = [
    f"{name} is {getattr(stored, name)!r} in place of {getattr(given, name)!r}"
    for name in sorted(decided)
    if getattr(stored, name) != getattr(given, name)
  ]
  if replaced:
    logging.warning(
      "The model in %s decides these keys of config.model: %s.", workdir, "; ".join(replaced)
    )


def load_params(
  config: TrainConfig, mesh: Mesh, budgets: HeadBudgets | None = None
) -> PyTree[Array]:
  """The parameters in `config.init_from`, in the dtype that the config stores them in.

  Each device reads its own shards over `mesh`. With head budgets the heads are in the order of the
  budgets of `find_initial`. With `config.model.head_gates` all gates start at `config.full_heads`.

  Args:
    config: of the run.
    mesh: of the run.
    budgets: from `find_initial`.

  Raises:
    CheckpointError: there is no checkpoint, or a damaged one.
    ValueError: the budgets do not fit the model, or the model has budgets already, to which no
      file of budgets and no gates are added.
  """
  assert config.init_from is not None
  model, _, _ = load_model(config.init_from, mesh=mesh)
  if config.model.head_gates and model.config.head_budgets is not None:
    raise ValueError(
      f"config.init_from is {config.init_from!r}, whose model has head budgets; gates choose the "
      "full heads of a model without budgets. Give the model from before any budgets."
    )
  parts = mesh.shape["tensor"]
  if budgets is not None and config.budgets is not None:
    model = apply_budgets(model, budgets, parts=parts)
  elif budgets is not None:
    model = arrange_heads(model, _in_order_of(model, budgets), parts=parts)
  params: Any = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  dtype = jnp.dtype(config.model.param_dtype)
  params = jax.tree.map(lambda array: array.astype(dtype), params)
  params.pop(GATES, None)
  if config.model.head_gates:
    params[GATES] = initial_gates(config)
  return params


def _in_order_of(model: Decoder, budgets: HeadBudgets) -> HeadBudgets:
  """The budgets of config.model, in the order of the model's heads.

  A run whose config has the same budgets, in the order of an earlier model, has moved the heads.
  """
  stored = model.config.head_budgets
  if stored is None:
    return budgets
  if stored.arranged() != budgets.arranged():
    raise ValueError(
      "config.model.head_budgets differs from the head budgets of the model in config.init_from, "
      "whose heads are in their order. Give the model's own, or the model from before any budgets."
    )
  return stored
