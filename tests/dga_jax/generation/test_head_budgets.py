"""Continuous batching of a model whose KV heads have settings of their own."""

import numpy as np
import pytest
from flax import nnx

from dga_jax import DGAConfig, HeadBudgets, SinkWindow
from dga_jax.generation import ContinuousBatching, Request, Sampling
from dga_jax.model import apply_budgets, Decoder, ModelConfig

GREEDY = Sampling(temperature=0.0)
BLOCKS = DGAConfig(selection="streaming", group_size=5, sink_tokens=2, local_window=1)
BUDGETS = HeadBudgets(("full", BLOCKS, SinkWindow(6, sinks=2)), ((1, 0), (1, 2)))


@pytest.fixture(scope="module")
def model():
  config = ModelConfig(
    vocab_size=61,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    dtype="float32",
  )
  return apply_budgets(Decoder(config, rngs=nnx.Rngs(0)), BUDGETS)


def test_tokens_do_not_depend_on_other_slots_or_chunks(model):
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 61, n).tolist() for n in (1, 13, 40)]
  requests = [Request(prompt, 9, GREEDY) for prompt in prompts]
  together = ContinuousBatching(model, requests, slots=2).run().tokens
  assert [len(tokens) for tokens in together] == [9, 9, 9]
  in_chunks = ContinuousBatching(model, requests[1:], slots=1, prompt_chunk=8).run().tokens
  assert in_chunks == together[1:]
