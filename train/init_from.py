"""Training that begins with the model of a checkpoint: of an import or of another run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from dga_jax.checkpoint import load_config, load_model, load_model_config, load_tokenizer
from dga_jax.checkpoint_files import existing_step
from dga_jax.head_budgets import read_head_budgets
from dga_jax.model import apply_budgets
from dga_jax.model.config import ATTENTION_SETTINGS
from dga_jax.tokenizer import Tokenizer
from train.config import TrainConfig
from train.gates import GATES, initial_gates

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
      dtypes, remat and unroll_layers stay those of the config.
    tokenizer: the checkpoint's, or None where training begins with nothing.
    entries: further entries for the config in the run's own checkpoints.
  """

  config: TrainConfig
  tokenizer: Tokenizer | None = None
  entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def find_initial(config: TrainConfig, workdir: str | None, step: int | None = None) -> Initial:
  """Reads everything but the parameters.

  Args:
    config: of the run.
    workdir: the folder with the checkpoint: `config.init_from`, or the run's own folder once it has
      checkpoints. Not read where `config.init_from` is None.
    step: which checkpoint; None for the newest.

  Raises:
    CheckpointError: there is no checkpoint, or a damaged one.
    OSError: the file of `config.budgets` cannot be read.
    ValueError: the budgets do not fit the model, or gates have no model.
  """
  if config.model.head_gates and config.init_from is None:
    raise ValueError(
      "config.init_from is None; it must be a folder with a model, since config.model.head_gates "
      "chooses full heads among those of a given model."
    )
  attention = _attention_of_budgets(config)
  if config.init_from is None or workdir is None:
    model = dataclasses.replace(config.model, **attention)
    return Initial(dataclasses.replace(config, model=model))
  step = existing_step(workdir, step)
  saved = load_config(workdir, step)
  own = {name: getattr(config.model, name) for name in _OWN_FIELDS} | attention
  model = dataclasses.replace(load_model_config(workdir, step), **own)
  entries = {ORIGIN: saved[ORIGIN]} if ORIGIN in saved else {}
  return Initial(dataclasses.replace(config, model=model), load_tokenizer(workdir, step), entries)


def _attention_of_budgets(config: TrainConfig) -> dict[str, Any]:
  """The fields of the model that `config.budgets` decides; none without budgets."""
  if config.budgets is None:
    return {}
  budgets = read_head_budgets(config.budgets)
  permuted = budgets.permute_kv_heads(budgets.contiguous_order())
  return {"attention": "head_budgets", "head_budgets": permuted}


def load_params(config: TrainConfig, mesh: Mesh) -> PyTree[Array]:
  """The parameters in `config.init_from`, in the dtype that the config stores them in.

  Each device reads its own shards over `mesh`. With `config.budgets` the heads are in the order of
  the budgets of `find_initial`. With `config.model.head_gates` all gates start at
  `config.full_heads`.

  Raises:
    CheckpointError: there is no checkpoint, or a damaged one.
    OSError: the file of `config.budgets` cannot be read.
    ValueError: the budgets do not fit the model, or the model has budgets already, to which no
      budgets or gates are added.
  """
  assert config.init_from is not None
  model, _, _ = load_model(config.init_from, mesh=mesh)
  if config.model.head_gates and model.config.head_budgets is not None:
    raise ValueError(
      f"config.init_from is {config.init_from!r}, whose model has head budgets; gates choose the "
      "full heads of a model without budgets. Give the model from before any budgets."
    )
  if config.budgets is not None:
    model = apply_budgets(model, read_head_budgets(config.budgets))
  params: Any = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  dtype = jnp.dtype(config.model.param_dtype)
  params = jax.tree.map(lambda array: array.astype(dtype), params)
  params.pop(GATES, None)
  if config.model.head_gates:
    params[GATES] = initial_gates(config)
  return params
