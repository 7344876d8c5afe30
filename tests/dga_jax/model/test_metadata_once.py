"""Attention metadata is computed once per forward pass, outside the scan over layers."""

import dataclasses
from collections.abc import Iterator
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import subjaxprs

from dga_jax import DGAConfig, HeadBudgets
from dga_jax.choices import AttentionName
from dga_jax.model import ModelConfig
from dga_jax.model.attention_kinds.base import AttentionKind
from tests.dga_jax.model.random_decoder import abstract_decoder

LAYERS = 7
CONFIG = ModelConfig(
  vocab_size=32,
  num_layers=LAYERS,
  embed_dim=16,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=24,
  attention="dga",
)
STREAMING = DGAConfig(selection="streaming", group_size=3, max_documents=4)
GLOBAL = DGAConfig(group_size=3, min_focal_tokens=0, max_documents=4)
# Primitives of document boundaries, blocks and visibility, and of sampled queries.
CUMULATIVE = {"cumsum", "cummax", "cummin"}
RANDOM = {"random_fold_in", "random_bits", "threefry2x32"}


def primitives(jaxpr) -> Iterator[str]:
  for equation in jaxpr.eqns:
    yield equation.primitive.name
  for inner in subjaxprs(jaxpr):
    yield from primitives(inner)


def layer_scans(jaxpr) -> Iterator[set[str]]:
  """The names of the primitives in each scan over layers."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "scan" and equation.params["length"] == LAYERS:
      body = equation.params["jaxpr"]
      yield set(primitives(getattr(body, "jaxpr", body)))
  for inner in subjaxprs(jaxpr):
    yield from layer_scans(inner)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(
  ("dga", "once"), [(STREAMING, CUMULATIVE), (GLOBAL, RANDOM)], ids=["streaming", "global"]
)
def test_layers_do_not_compute_metadata(dga: DGAConfig, once: set[str], remat: str) -> None:
  config = dataclasses.replace(CONFIG, dga=dga, remat=remat)
  graphdef, params = nnx.split(abstract_decoder(config))
  tokens = jax.ShapeDtypeStruct((2, 48), jnp.int32)

  def loss(params, tokens, segment_ids):
    states = nnx.merge(graphdef, params).hidden(tokens, segment_ids=segment_ids)
    return states.astype(jnp.float32).sum()

  jaxpr = jax.make_jaxpr(jax.grad(loss))(params, tokens, tokens).jaxpr
  scans = list(layer_scans(jaxpr))
  assert len(scans) == 2, "forward and backward"
  assert once & set(primitives(jaxpr))
  for names in scans:
    assert not names & once


@pytest.mark.parametrize("name", get_args(AttentionName))
def test_make_attention_returns_the_kind_of_each_name(name: str) -> None:
  budgets = HeadBudgets(("full", STREAMING), ((0,),) + ((1,),) * (LAYERS - 1))
  kind = dataclasses.replace(CONFIG, attention=name, head_budgets=budgets).make_attention()
  assert isinstance(kind, AttentionKind)
  assert kind.name == name
  assert isinstance(hash(kind), int)


def test_a_kind_without_a_cache_raises() -> None:
  class Identity(AttentionKind):
    name = "identity"

    def attend(self, q, k, v, metadata):
      return q

  x = jnp.ones((1, 3, 2, 8))
  np.testing.assert_array_equal(Identity()(x, x, x), x)
  with pytest.raises(NotImplementedError, match="Identity attends to whole sequences"):
    Identity().init_cache(1, 4, 2, 8, jnp.float32)
  with pytest.raises(ValueError, match="attention is 'identity', which reads a prompt whole"):
    Identity().extend(x, x, x, None, jnp.int32(0), lengths=jnp.ones(1, jnp.int32))
