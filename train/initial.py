"""Training that begins with the model of a checkpoint, of an import or of another run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from dga_jax.checkpoint import load_config, load_model
from dga_jax.model import ModelConfig
from dga_jax.model.config import ATTENTION_SETTINGS
from train.config import TrainConfig

# What stays the training config's own; the rest says what the weights are and how RoPE turns.
_OWN_FIELDS = frozenset({"attention", *ATTENTION_SETTINGS, "dtype", "param_dtype", "remat"})


def with_model_of(config: TrainConfig, workdir: str | Path) -> TrainConfig:
  """The config with the model whose checkpoint lies in `workdir`.

  Attention, its settings, dtypes and remat stay those of `config`.

  Raises:
    CheckpointError: there is no checkpoint, or a damaged one.
  """
  saved = ModelConfig.from_dict(load_config(workdir)["model"])
  own = {name: getattr(config.model, name) for name in _OWN_FIELDS}
  return dataclasses.replace(config, model=dataclasses.replace(saved, **own))


def load_params(config: TrainConfig) -> PyTree[Array]:
  """The parameters in `config.init_from`, in the dtype that the config stores them in.

  Raises:
    CheckpointError: there is no checkpoint, or a damaged one.
  """
  assert config.init_from is not None
  saved = ModelConfig.from_dict(load_config(config.init_from)["model"])
  model, _, _ = load_model(config.init_from, config=saved)
  params: Any = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  dtype = jnp.dtype(config.model.param_dtype)
  return jax.tree.map(lambda array: array.astype(dtype), params)
