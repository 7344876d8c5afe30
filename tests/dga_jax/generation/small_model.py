"""The small decoder of the tests of generation, and its continuations."""

import numpy as np
from flax import nnx

from dga_jax import DGAConfig
from dga_jax.generation import Sampling
from dga_jax.model import ModelConfig

CONFIG = ModelConfig(
  vocab_size=61,
  num_layers=2,
  embed_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=48,
  attention="dga",
  dga=DGAConfig(selection="streaming", group_size=5, sink_tokens=2, local_window=1),
  dtype="float32",
)
GREEDY = Sampling(temperature=0.0)
MAX_LENGTH = 400


def prompt_of(length, seed=0):
  return np.random.default_rng(seed).integers(0, 61, length).tolist()


def run(engine, requests=()):
  """Submits requests and runs the engine until it is idle: {number: (tokens, last Emitted)}."""
  for request in requests:
    engine.submit(request)
  results = {}
  while engine.busy:
    for emitted in engine.step():
      tokens, _ = results.get(emitted.request, ([], None))
      results[emitted.request] = (tokens + emitted.tokens, emitted)
  return results


def greedy_continuation(model):
  """(prompt, new) -> the most likely continuation, by a pass over the whole sequence a token."""
  forward = nnx.jit(lambda model, tokens, lengths: model(tokens, lengths=lengths))

  def continue_prompt(prompt, new):
    tokens = np.zeros((1, MAX_LENGTH), np.int32)
    tokens[0, : len(prompt)] = prompt
    for length in range(len(prompt), len(prompt) + new):
      logits = forward(model, tokens, np.array([length]))
      tokens[0, length] = np.argmax(logits[0, length - 1])
    return tokens[0, len(prompt) : len(prompt) + new].tolist()

  return continue_prompt
