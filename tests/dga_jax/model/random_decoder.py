"""Decoders with random weights, made without compiling their initialisation."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dga_jax.model import Decoder, ModelConfig


def abstract_decoder(config: ModelConfig) -> Decoder:
  """A decoder whose parameters are shapes."""
  return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def random_decoder(config: ModelConfig, seed: int = 0) -> Decoder:
  """A decoder with normal weights; norm scales are not all one, so that a lost one shows."""
  rng = np.random.default_rng(seed)
  structure, state = nnx.split(abstract_decoder(config))
  filled = []
  for path, variable in nnx.to_flat_state(state):
    value = 0.25 * rng.normal(size=variable.shape) + (path[-1] == "scale")
    filled.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
  return nnx.merge(structure, nnx.from_flat_state(filled))
