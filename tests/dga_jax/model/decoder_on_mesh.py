"""Inputs for tests of the decoder on meshes of four devices, with our or foreign axis names."""

import dataclasses

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dga_jax import DGAConfig
from dga_jax.model import ModelConfig
from dga_jax.sharding import parameter_shardings, ShardingRules, use_rules
from tests.dga_jax.model.random_decoder import abstract_decoder

RULES = {
  "own": ShardingRules(),
  "foreign": ShardingRules(
    batch=("x",), heads=("y",), mlp=("y",), vocab=("y",), stored_embed=("x",)
  ),
}


def model_config(selection="streaming", **changes):
  dga = DGAConfig(
    selection=selection, group_size=4, min_focal_tokens=0, n_recent=4, n_random=4, max_documents=2
  )
  small = ModelConfig(
    vocab_size=48,
    num_layers=2,
    embed_dim=16,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    mlp_dim=32,
    dtype="float32",
    remat="full",
    dga=dga,
  )
  return dataclasses.replace(small, **changes)


def draw_batch(B=4, L=24):
  """Tokens with two documents per row, and weights for a weighted sum of the logits."""
  rng = np.random.default_rng(0)
  segments_BxL = (np.arange(L)[None] >= 7 + np.arange(B)[:, None]).astype(np.int32)
  segments_BxL[:, -3:] = -1
  return {
    "tokens": rng.integers(0, 48, (B, L), dtype=np.int32),
    "segment_ids": segments_BxL,
    "weights": rng.normal(size=(B, L, 48)).astype(np.float32) / L,
  }


def logits_and_gradient(config):
  """A function of parameters (a nested dict) and a batch: logits and the parameters' gradient."""
  structure, _ = nnx.split(abstract_decoder(config))

  def run(params, batch):
    def loss(params):
      logits = nnx.merge(structure, params)(batch["tokens"], segment_ids=batch["segment_ids"])
      return (logits * batch["weights"]).sum(), logits

    (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, gradient

  return run


def shardings(config, mesh, rules):
  """Shardings of the parameters and of the batch."""
  with use_rules(rules):
    params = parameter_shardings(nnx.state(abstract_decoder(config)), mesh)
  return params, {name: NamedSharding(mesh, P(rules.batch)) for name in draw_batch()}


def shapes_on(config, mesh, rules, B, L):
  """Shapes of the parameters and of the batch, with their shardings."""
  params = nnx.to_pure_dict(nnx.state(abstract_decoder(config)))
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    (params, draw_batch(B, L)),
    shardings(config, mesh, rules),
  )
