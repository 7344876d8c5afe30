"""The engine: requests at any time, kept caches, cancellation, bytes, and no compilation."""

import threading
import time

import jax
import numpy as np
import pytest
from flax import nnx

from dga_jax.generation import (
  Engine,
  EngineStoppedError,
  QueueFullError,
  Request,
  Sampling,
)
from dga_jax.model import Decoder
from tests.dga_jax.generation.small_model import (
  CONFIG,
  GREEDY,
  greedy_continuation,
  MAX_LENGTH,
  prompt_of,
  run,
)

MANY = 1 << 30  # A budget of bytes that nothing here reaches.


@pytest.fixture(scope="module")
def model():
  return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def shared_engine(model):
  """Compiled once; every test begins with an empty one."""
  return Engine(
    model,
    slots=3,
    max_length=MAX_LENGTH,
    prompt_chunk=64,
    cache_bytes=MANY,
    max_waiting=4,
    logprobs=True,
  )


@pytest.fixture
def engine(shared_engine):
  shared_engine.reset()
  return shared_engine


@pytest.fixture(scope="module")
def greedy(model):
  return greedy_continuation(model)


def test_requests_that_arrive_at_any_time_get_the_tokens_of_a_request_alone(engine, greedy):
  jobs = [
    (150, 9, GREEDY),
    (3, 30, Sampling(temperature=1.0, seed=5)),
    (70, 12, GREEDY),
    (8, 1, GREEDY),
    (64, 17, Sampling(temperature=0.9, top_k=7, seed=2)),
  ]
  results, arrived = {}, 0
  while engine.busy or arrived < len(jobs):
    if arrived < len(jobs):
      length, new, sampling = jobs[arrived]
      engine.submit(Request(prompt_of(length, seed=arrived), new, sampling))
      arrived += 1
    for emitted in engine.step():
      results.setdefault(emitted.request, []).extend(emitted.tokens)
  for i, (length, new, sampling) in enumerate(jobs):
    prompt = prompt_of(length, seed=i)
    engine.reset()
    ((tokens, _),) = run(engine, [Request(prompt, new, sampling)]).values()
    assert results[i] == tokens
    if sampling == GREEDY:
      assert tokens == greedy(prompt, new)


def test_a_running_request_waits_for_one_piece_of_another_prompt(engine):
  engine.submit(Request(prompt_of(5), 80, GREEDY))
  engine.step()
  long = engine.submit(Request(prompt_of(300, seed=1), 2, GREEDY))
  steps = 0
  while True:
    emitted = {one.request: one.tokens for one in engine.step()}
    if long in emitted:
      break
    steps += 1
    assert len(emitted[0]) == 4  # The decode chunk of this step.
  assert steps >= 300 // 64


def test_a_cancelled_request_ends_before_the_next_chunk_and_frees_its_slot(engine):
  numbers = [engine.submit(Request(prompt_of(40, seed=i), 200, GREEDY)) for i in range(4)]
  while engine.status().running < 3:
    engine.step()
  engine.cancel(numbers[0])
  engine.cancel(numbers[3])  # It waits.
  ended = [one for one in engine.step() if one.done]
  assert [(one.request, one.finish) for one in ended] == [(0, "cancelled"), (3, "cancelled")]
  assert (engine.status().running, engine.status().waiting) == (2, 0)
  engine.cancel(numbers[0])  # It has ended: nothing happens.
  reading = engine.submit(Request(prompt_of(300), 5, GREEDY))
  engine.step()
  engine.cancel(reading)
  assert [one.request for one in engine.step() if one.done] == [reading]
  for number in numbers[1:3]:
    engine.cancel(number)
  engine.step()
  assert not engine.busy
  assert engine.status().running == 0


def test_slots_without_a_request_are_empty(engine):
  run(engine, [Request(prompt_of(70 + i, seed=i), 6, GREEDY) for i in range(3)])
  engine.submit(Request(prompt_of(20), 30, Sampling(temperature=1.0)))
  for _ in range(3):
    engine.step()
  assert engine._state.cache.length.tolist()[1:] == [0, 0]
  assert engine._state.cache.length[0] > 20
  assert engine._state.settings.sampling.temperature.tolist() == [1.0, 0.0, 0.0]


def test_nothing_compiles_after_the_constructor(engine):
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
  )
  first = prompt_of(130)
  how = Sampling(temperature=0.7, seed=3, logit_bias=((4, 2.0),), top_logprobs=2)
  run(engine, [Request(first, 6, GREEDY), Request(prompt_of(9), 3, how)])
  run(engine, [Request([*first, *prompt_of(20, seed=4)], 6, GREEDY), Request(first, 3, how)])
  engine.status()
  assert compiled == []


def test_the_next_turn_reads_only_what_is_new(engine, greedy):
  first = prompt_of(150)
  ((answer, emitted),) = run(engine, [Request(first, 12, GREEDY)]).values()
  assert emitted.cached_tokens == 0
  second = [*first, *answer, *prompt_of(10, seed=1)]
  (_, (tokens, emitted)) = run(engine, [Request(second, 12, GREEDY)]).popitem()
  assert emitted.cached_tokens == 150 + 11  # The cache never got the last token.
  assert tokens == greedy(second, 12)
  ((again, emitted),) = run(engine, [Request(second, 12, GREEDY)]).values()
  assert (again, emitted.cached_tokens) == (tokens, len(second))


def test_a_conversation_continues_after_answers_of_every_length(engine, greedy):
  # Answers end at every offset in a block of 6 tokens, and in a decode chunk of 4.
  first, message = prompt_of(90), prompt_of(5, seed=1)
  continuation = greedy(first, 14)
  neighbour = Request(prompt_of(7, seed=3), 200, GREEDY)  # It keeps decode chunks coming.
  for count in range(2, 14):
    engine.reset()
    engine.submit(neighbour)
    engine.step()
    (_, (answer, _)) = run(engine, [Request(first, count, GREEDY)]).popitem()
    assert answer == continuation[:count]
    second = [*first, *answer, *message]
    (_, (tokens, emitted)) = run(engine, [Request(second, 3, GREEDY)]).popitem()
    assert emitted.cached_tokens == 90 + count - 1
    assert tokens == greedy(second, 3)


def test_an_answer_that_a_stop_token_ends_is_kept_without_it(engine, greedy):
  first, how = prompt_of(90), Sampling(temperature=1.0, seed=5)
  ((continuation, _),) = run(engine, [Request(first, 14, how)]).values()
  end = next(i for i in range(5, 14) if continuation[i] not in continuation[:i])
  stop = continuation[end]
  engine.reset()
  engine.submit(Request(prompt_of(7, seed=3), 200, GREEDY))  # It keeps decode chunks coming.
  engine.step()
  (_, (answer, _)) = run(engine, [Request(first, 100, how, stop_ids=[stop])]).popitem()
  assert answer == continuation[:end]
  second = [*first, *answer, stop, *prompt_of(5, seed=1)]
  (_, (tokens, emitted)) = run(engine, [Request(second, 6, GREEDY)]).popitem()
  assert emitted.cached_tokens == 90 + end
  assert tokens == greedy(second, 6)


def test_what_is_read_ahead_is_kept_and_waits_for_prompts(engine, greedy):
  first = prompt_of(90)
  run(engine, [Request(first, 12, GREEDY)])
  answer = [*first, *greedy(first, 7)]
  engine.submit(Request(prompt_of(5), 2, GREEDY))
  engine.read_ahead(answer)
  engine.step()
  assert engine.busy
  run(engine)
  second = [*answer, *prompt_of(10, seed=1)]
  (_, (tokens, emitted)) = run(engine, [Request(second, 4, GREEDY)]).popitem()
  assert (tokens, emitted.cached_tokens) == (greedy(second, 4), len(answer))


def test_a_prompt_does_not_wait_for_what_is_read_ahead(engine, greedy):
  engine.read_ahead(prompt_of(390))
  engine.step()
  prompt = prompt_of(5, seed=1)
  number = engine.submit(Request(prompt, 1, GREEDY))
  assert [(one.request, one.tokens) for one in engine.step()] == [(number, greedy(prompt, 1))]
  assert not engine.busy


def test_a_turn_that_changes_the_answer_continues_after_the_prompt(engine, greedy):
  first = prompt_of(90)
  ((answer, _),) = run(engine, [Request(first, 12, GREEDY)]).values()
  changed = [*first, *answer[:4], (answer[4] + 1) % 61, *answer[5:], 3]
  (_, (tokens, emitted)) = run(engine, [Request(changed, 6, GREEDY)]).popitem()
  assert emitted.cached_tokens == 90
  assert tokens == greedy(changed, 6)


def test_a_shared_system_prompt_is_read_once(engine, greedy, monkeypatch):
  read = []
  extend = engine.programs.extend

  def counted(row, piece, count):
    read.append(count)
    return extend(row, piece, count)

  monkeypatch.setattr(engine.programs, "extend", counted)
  system = prompt_of(128)
  prompts = [[*system, *prompt_of(20, seed=i)] for i in range(1, 4)]
  results = run(engine, [Request(prompt, 5, GREEDY, keep_at=[128, 5]) for prompt in prompts])
  assert sum(read) == 128 + 3 * 20
  assert [emitted.cached_tokens for _, emitted in results.values()] == [0, 128, 128]
  assert [tokens for tokens, _ in results.values()] == [greedy(p, 5) for p in prompts]


def test_a_beginning_that_prompts_happen_to_share_is_found(engine):
  system = prompt_of(100)
  requests = [Request([*system, i, *prompt_of(30, seed=i)], 2, GREEDY) for i in range(1, 4)]
  results = run(engine, requests)
  assert [emitted.cached_tokens for _, emitted in results.values()] == [0, 0, 100]


def test_a_full_queue_and_a_bad_request(engine):
  for _ in range(7):
    engine.submit(Request([1], 5))
  with pytest.raises(QueueFullError, match="3 requests run and 4 wait"):
    engine.submit(Request([1], 5))
  with pytest.raises(ValueError, match="399 tokens; with max_new_tokens=2 it exceeds"):
    engine.submit(Request([1] * 399, 2))


def test_stop_ids_and_log_probabilities(model, engine, greedy):
  tokens = greedy(prompt_of(20), 9)
  stop = tokens[4]
  how = Sampling(temperature=0.0, top_logprobs=3)
  request = Request(prompt_of(20), 9, how, stop_ids=[stop])
  ((got, emitted),) = run(engine, [request]).values()
  assert got == tokens[: tokens.index(stop)]
  assert emitted.finish == "stop"

  engine.reset()
  engine.submit(Request(prompt_of(20), 9, how))
  logprobs = []
  while engine.busy:
    logprobs += [row for one in engine.step() for row in one.logprobs]
  sequence = np.array([prompt_of(20) + tokens])
  logits = nnx.jit(lambda m, t: m(t))(model, sequence)[0, 19:-1]
  want = np.asarray(jax.nn.log_softmax(logits, axis=-1))
  assert [row.top[0][0] for row in logprobs] == tokens
  for t, row in enumerate(logprobs):
    np.testing.assert_allclose(row.logprob, want[t, tokens[t]], atol=1e-4)
    np.testing.assert_allclose([v for _, v in row.top], np.sort(want[t])[:-4:-1], atol=1e-4)


def test_log_probabilities_of_a_prompt(model, engine):
  prompt = prompt_of(140)  # Two whole pieces, and a part of one.
  how = Sampling(temperature=0.0, top_logprobs=2)
  plain = run(engine, [Request(prompt, 4, how)])[0]
  engine.submit(Request(prompt, 4, how, prompt_logprobs=True))
  emitted = []
  while engine.busy:
    emitted += engine.step()
  assert [token for one in emitted for token in one.tokens] == plain[0]
  assert [one.prompt_logprobs is None for one in emitted] == [False] + [True] * (len(emitted) - 1)
  assert emitted[0].cached_tokens == 0
  want = np.asarray(jax.nn.log_softmax(nnx.jit(lambda m, t: m(t))(model, np.array([prompt]))[0]))
  rows = emitted[0].prompt_logprobs
  own = want[np.arange(139), prompt[1:]]
  np.testing.assert_allclose([row.logprob for row in rows], own, atol=1e-4)
  top = np.sort(want[:-1], axis=1)[:, :-3:-1]
  np.testing.assert_allclose([[v for _, v in row.top] for row in rows], top, atol=1e-4)


def test_a_bias_forces_and_forbids_tokens(engine, greedy):
  forced = Sampling(temperature=0.0, logit_bias=((17, 100.0),))
  first = greedy(prompt_of(9), 1)[0]
  forbidden = Sampling(temperature=0.0, logit_bias=((first, -100.0),))
  results = run(engine, [Request(prompt_of(9), 4, forced), Request(prompt_of(9), 4, forbidden)])
  assert results[0][0] == [17] * 4
  assert first not in results[1][0][:1]


def test_the_thread_serves_requests_of_other_threads_and_stops(engine, greedy):
  engine.start()
  want = {i: greedy(prompt_of(10 + i, seed=i), 6) for i in range(4)}
  got, ended = {i: [] for i in want}, [threading.Event() for _ in want]

  def client(i):
    def deliver(emitted):
      got[i].extend(emitted.tokens)
      if emitted.done:
        ended[i].set()

    engine.submit(Request(prompt_of(10 + i, seed=i), 6, GREEDY), deliver)

  threads = [threading.Thread(target=client, args=(i,)) for i in want]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert all(event.wait(60) for event in ended)
  assert got == want

  finishes = []
  engine.submit(Request([1], 390, GREEDY), lambda one: finishes.append(one.finish))
  engine.close()
  assert finishes[-1] == "cancelled"
  with pytest.raises(EngineStoppedError):
    engine.submit(Request([1], 2))


def test_a_failing_engine_ends_its_requests(engine, monkeypatch, caplog):

  def broken(*_):
    raise RuntimeError("the device is gone")

  monkeypatch.setattr(engine.programs, "decode", broken)
  finishes = []
  engine.start()
  engine.submit(Request([1], 5, GREEDY), lambda one: finishes.append(one.finish))
  deadline = time.monotonic() + 30
  while not finishes or finishes[-1] is None:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  assert finishes[-1] == "failed"
  assert "the device is gone" in str(engine.error)
  assert "the engine has failed" in caplog.text
  engine.close()
