"""Decoders with random weights, without compiling the decoder's own initialisation."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dga_jax.model import Decoder, ModelConfig


def abstract_decoder(config: ModelConfig) -> Decoder:
  """A decoder whose parameters are `jax.ShapeDtypeStruct`s."""
  return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def random_decoder(config: ModelConfig) -> Decoder:
  """A decoder with normal weights. Norm scales differ from 1, so that a missing one is noticed."""
  rng = np.random.default_rng(0)
  structure, state = nnx.split(abstract_decoder(config))
  filled = []
  for path, variable in nnx.to_flat_state(state):
    value = 0.25 * rng.normal(size=variable.shape) + (path[-1] == "scale")
    filled.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
  return nnx.merge(structure, nnx.from_flat_state(filled))
