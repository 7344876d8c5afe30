"""Kept caches stay within their bytes, and move between device and host."""

import threading

import pytest
from flax import nnx

from dga_jax.generation import Engine, Request
from dga_jax.generation.cache_shapes import all_bytes, CacheShapes
from dga_jax.model import Decoder
from tests.dga_jax.generation.small_model import (
  CONFIG,
  GREEDY,
  greedy_continuation,
  MAX_LENGTH,
  prompt_of,
  run,
)


@pytest.fixture(scope="module")
def model():
  return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def greedy(model):
  return greedy_continuation(model)


def test_answers_that_end_together_stay_within_the_bytes(model):
  row = CacheShapes(model, MAX_LENGTH).row_bytes
  engine = Engine(
    model, slots=3, max_length=MAX_LENGTH, prompt_chunk=64, pieces_per_step=None,
    cache_bytes=6 * row, decode_chunk=8,
  )  # fmt: skip  # Three slots, two prompts being read, and one kept.
  for seed in range(2):  # The second round finds no reservation of the first one.
    prompts = [prompt_of(70, seed=3 * seed + i) for i in range(3)]
    numbers = [engine.submit(Request(prompt, 9, GREEDY)) for prompt in prompts]
    engine.cancel(engine.submit(Request(prompt_of(70, seed=9), 9, GREEDY)))
    first: list[int] = []
    while engine.busy:
      first += [token for new in engine.step() if new.request == numbers[0] for token in new.tokens]
      assert engine.status().kept_device_bytes <= row
    assert engine.status().kept == 1
    (_, (_, emitted)) = run(engine, [Request([*prompts[0], *first], 1, GREEDY)]).popitem()
    assert emitted.cached_tokens == 70 + 8


def test_kept_caches_move_to_the_host_and_back(model, greedy):
  shapes = CacheShapes(model, MAX_LENGTH)
  row = shapes.row_bytes
  engine = Engine(
    model,
    slots=1,
    max_length=MAX_LENGTH,
    prompt_chunk=64,
    cache_bytes=4 * row,  # One slot, two prompts being read, and one kept.
    host_bytes=row // 2,
  )
  prompts = [prompt_of(90, seed=i) for i in range(4)]
  for prompt in prompts[:2]:
    run(engine, [Request(prompt, 1, GREEDY)])
  status = engine.status()
  assert status.kept_device_bytes == row
  assert status.kept_host_bytes == all_bytes(shapes.rows(1, 128)) < row // 2  # 90 tokens of 400.
  turn = [*prompts[0], *prompt_of(8, seed=9)]
  (_, (tokens, emitted)) = run(engine, [Request(turn, 6, GREEDY)]).popitem()
  assert emitted.cached_tokens == 90
  assert tokens == greedy(turn, 6)
  for prompt in prompts[2:]:
    run(engine, [Request(prompt, 1, GREEDY)])
  assert engine.status().kept_host_bytes <= row // 2
  (_, (_, emitted)) = run(engine, [Request([*prompts[1], 5], 2, GREEDY)]).popitem()
  assert emitted.cached_tokens == 0  # The least recently used is gone.


def test_decoding_continues_while_caches_are_copied(model, greedy, monkeypatch):
  row = CacheShapes(model, MAX_LENGTH).row_bytes
  engine = Engine(
    model,
    slots=2,
    max_length=MAX_LENGTH,
    prompt_chunk=64,
    cache_bytes=6 * row,  # Two slots, two prompts being read, and two kept.
    host_bytes=8 * row,
  )
  may_copy, programs = threading.Event(), engine.programs
  trim, load_row = programs.shapes.trim, programs.load_row
  monkeypatch.setattr(programs.shapes, "trim", lambda *x: may_copy.wait(60) and trim(*x))
  monkeypatch.setattr(programs, "load_row", lambda *x: may_copy.wait(60) and load_row(*x))

  # The second prompt begins the move of the first one, and nothing waits for it.
  prompts = [prompt_of(90, seed=i) for i in range(3)]
  for prompt in prompts[:2]:
    run(engine, [Request(prompt, 1, GREEDY)])
  assert engine.status().kept_device_bytes == 2 * row
  may_copy.set()
  run(engine, [Request(prompts[2], 1, GREEDY)])
  assert engine.status().kept_device_bytes <= 2 * row

  may_copy.clear()
  running = engine.submit(Request(prompt_of(9, seed=5), 40, GREEDY))
  engine.step()
  turn = [*prompts[0], *prompt_of(8, seed=9)]
  waiting = engine.submit(Request(turn, 6, GREEDY))
  tokens = {running: [], waiting: []}
  for _ in range(5):
    for emitted in engine.step():
      tokens[emitted.request] += emitted.tokens
  assert len(tokens[running]) >= 12
  assert tokens[waiting] == []
  may_copy.set()
  while engine.busy:
    for emitted in engine.step():
      tokens[emitted.request] += emitted.tokens
      assert emitted.cached_tokens == (90 if emitted.request == waiting else 0)
  assert tokens[running] == greedy(prompt_of(9, seed=5), 40)
  assert tokens[waiting] == greedy(turn, 6)


def test_slots_that_exceed_the_bytes_are_refused(model):
  budget = 3 * CacheShapes(model, MAX_LENGTH).row_bytes
  with pytest.raises(ValueError, match=r"3 slots and two prompts.*Use at most 1 slots"):
    Engine(model, slots=3, max_length=MAX_LENGTH, prompt_chunk=64, cache_bytes=budget)
