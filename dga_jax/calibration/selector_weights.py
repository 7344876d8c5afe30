"""A model with the weights of a fitted selector, in memory and as a checkpoint."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from dga_jax.checkpoint import abstract_decoder, Checkpoints
from dga_jax.config import DGAConfig
from dga_jax.files.lock import hold_workdir
from dga_jax.model import Decoder
from dga_jax.tokenizer import Tokenizer


def with_selector(
  model: Decoder, config: DGAConfig, weights: Float[np.ndarray, "K N S"]
) -> Decoder:
  """The model with these weights of a selector, and with attention="dga" under `config`.

  Args:
    model: with stacked layers. Its other parameters are shared.
    config: the selector of the result is "fitted".
    weights: from `selector_fit.fit_selector`; stored in the model's param_dtype.
  """
  changed = dataclasses.replace(
    model.config,
    focal_selector=True,
    attention="dga",
    dga=dataclasses.replace(config, selector="fitted"),
  )
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  stored = jnp.asarray(weights, jnp.dtype(changed.param_dtype))
  params["layers"]["attention"]["selector"] = stored
  result: Decoder = nnx.merge(abstract_decoder(changed)[0], params)
  return result


def save_with_selector(
  model: Decoder, saved: Mapping[str, Any], tokenizer: Tokenizer, workdir: Path
) -> None:
  """Writes a model of `with_selector` as checkpoint 0 of a folder without checkpoints.

  Args:
    model: from `with_selector`.
    saved: the config of the checkpoint that the model was made from; all but "model" is kept.
    tokenizer: of the model.
    workdir: made if need be.

  Raises:
    CheckpointError: the checkpoint could not be written.
  """
  with hold_workdir(workdir), Checkpoints(workdir, keep=1) as checkpoints:
    checkpoints.save(
      0,
      params=nnx.to_pure_dict(nnx.state(model, nnx.Param)),
      training={"step": jnp.int32(0)},
      data=None,
      config={**saved, "model": model.config.to_dict()},
      tokenizer=tokenizer,
    )
