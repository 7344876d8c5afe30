"""Continuous batching of a model whose KV heads have settings of their own."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from dga_jax import HeadBudgets, SinkWindow
from dga_jax.generation import ContinuousBatching, Engine, Request
from dga_jax.generation.live_bytes import live_bytes
from dga_jax.model import apply_budgets, Decoder
from dga_jax.model.attention_kinds.sliding_window import SlidingWindowConfig
from tests.dga_jax.generation.small_model import CONFIG, GREEDY

BLOCKS = CONFIG.dga
BUDGETS = HeadBudgets(("full", BLOCKS, SinkWindow(6, sinks=2)), ((1, 0), (1, 2)))


@pytest.fixture(scope="module")
def model():
  return apply_budgets(Decoder(CONFIG, rngs=nnx.Rngs(0)), BUDGETS)


def test_tokens_do_not_depend_on_other_slots_or_chunks(model):
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 61, n).tolist() for n in (1, 13, 40)]
  requests = [Request(prompt, 9, GREEDY) for prompt in prompts]
  together = ContinuousBatching(model, requests, slots=2).run().tokens
  assert [len(tokens) for tokens in together] == [9, 9, 9]
  in_chunks = ContinuousBatching(model, requests[1:], slots=1, prompt_chunk=8).run().tokens
  assert in_chunks == together[1:]


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_the_next_turn_continues_after_the_answer(cache_dtype):
  budgets = BUDGETS.with_cache_dtype(cache_dtype)
  model = apply_budgets(Decoder(CONFIG, rngs=nnx.Rngs(0)), budgets)
  engine = Engine(model, slots=1, max_length=160, prompt_chunk=16, cache_bytes=1 << 30)
  # All arrays of a slot but its counts of tokens.
  rows = jax.tree.leaves(engine.programs.shapes.rows(1))
  held = sum(x.size * x.dtype.itemsize for x in rows if x.dtype != np.int32)
  assert engine.programs.state_bytes == held
  first = np.random.default_rng(1).integers(0, 61, 70).tolist()

  def run(prompt: list[int], new: int) -> tuple[list[int], int]:
    engine.submit(Request(prompt, new, GREEDY))
    emitted = []
    while engine.busy:
      emitted += engine.step()
    return [token for one in emitted for token in one.tokens], emitted[-1].cached_tokens

  for count in (2, 5, 9, 12):
    engine.reset()
    answer, _ = run(first, count)
    turn = [*first, *answer, 3, 5]
    tokens, cached = run(turn, 6)
    assert cached == 70 + count - 1
    engine.reset()
    assert run(turn, 6) == (tokens, 0)


def test_live_bytes_count_the_entries_that_the_next_token_sees(model):
  head = 2 * 8 * 4  # A key and a value of 8 float32 numbers.
  # One full head, two with blocks, and one with 2 sinks and 5 tokens before the next one.
  assert live_bytes(model.config, 8) == head * (1 * 8 + 2 * 8 + 1 * 7)
  # Blocks of 6 tokens after 2 sinks: 5 blocks are older than the window of one block, and the
  # token at position 40 is the third of its block.
  assert live_bytes(model.config, 40) == head * (1 * 40 + 2 * (2 + 5 * 2 + 6 + 2) + 1 * 7)
  # A float32 scale for each key and each value in 8 bits.
  of_tokens = dataclasses.replace(model.config.head_budgets, cache_dtype="int8")
  config = dataclasses.replace(model.config, head_budgets=of_tokens)
  raw = (2 + 5 * 2 + 6 + 2) * head
  assert live_bytes(config, 40) == 2 * (8 + 4) * (1 * 40 + 1 * 7) + 2 * raw
  packed = dataclasses.replace(BLOCKS, cache_dtype="int8")
  config = dataclasses.replace(model.config, attention="dga", head_budgets=None, dga=packed)
  assert live_bytes(config, 40) == 4 * ((2 + 5 * 2) * 2 * (8 + 4) + (6 + 2) * head)
  assert live_bytes(config, 1) == 4 * 2 * (8 + 4)  # A sink.
  window = SlidingWindowConfig(window=10)
  config = dataclasses.replace(config, attention="sliding_window", sliding_window=window)
  assert [live_bytes(config, length) for length in (4, 40)] == [4 * 4 * head, 4 * 9 * head]
  with pytest.raises(ValueError, match="attention is 'minference', which reads prompts whole"):
    live_bytes(dataclasses.replace(config, attention="minference"), 3)
