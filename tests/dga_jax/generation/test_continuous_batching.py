"""Continuous batching: tokens do not depend on other requests, padding or chunking."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dga_jax import DGAConfig
from dga_jax.generation import ContinuousBatching, generate, Request, Sampling
from dga_jax.model import Decoder
from tests.dga_jax.generation.small_model import CONFIG, GREEDY
from tests.nightly import nightly


@pytest.fixture(scope="module")
def model():
  return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def prompts():
  return draw_prompts(1, 13, 40)


def draw_prompts(*lengths):
  rng = np.random.default_rng(0)
  return [rng.integers(0, 61, n).tolist() for n in lengths]


def with_attention(model, **changes):
  """The same weights under another attention."""
  config = dataclasses.replace(CONFIG, **changes)
  return nnx.merge(nnx.graphdef(Decoder(config, rngs=nnx.Rngs(0))), nnx.state(model))


def run(batch):
  """The tokens of every request, joined from the items of `steps`."""
  tokens = {}
  for step in batch.steps():
    for emitted in step:
      tokens.setdefault(emitted.request, []).extend(emitted.tokens)
  assert [tokens[i] for i in range(len(tokens))] == batch.result.tokens
  return batch.result.tokens


def test_teacher_forced_logits_equal_decoded_logits(model):
  tokens = jax.random.randint(jax.random.key(0), (2, 40), 0, 61)
  want = nnx.jit(lambda m, t: m(t))(model, tokens)
  lengths = jnp.array([9, 16])
  logits, cache = nnx.jit(lambda m, t, n: m.prefill(t, n, max_length=48))(
    model, tokens[:, :16], lengths
  )
  decode = nnx.jit(lambda m, t, c: m.decode(t, c))
  for t in range(24):
    at = np.array([9, 16]) + t
    np.testing.assert_allclose(logits, want[np.arange(2), at - 1], atol=1e-4)
    logits, cache = decode(model, tokens[np.arange(2), at], cache)


@pytest.mark.parametrize("kind", ["dga", "dense", *nightly("global", "streaming_llm", "kv_merger")])
def test_greedy_tokens_do_not_depend_on_neighbours(model, prompts, kind):
  if kind == "global":
    other = with_attention(model, dga=DGAConfig(min_focal_tokens=4, group_size=5))
  else:
    other = with_attention(model, attention=kind)
  requests = [
    Request(prompt, new, GREEDY) for prompt, new in zip(prompts, (20, 7, 13), strict=True)
  ]
  together = run(ContinuousBatching(other, requests, slots=2))
  assert [len(tokens) for tokens in together] == [20, 7, 13]
  alone = ContinuousBatching(other, requests[2:], slots=1, decode_chunk=3)
  assert run(alone) == together[2:]


@pytest.mark.parametrize("attention", ["dga", "dense"])
def test_chunks_of_prompts_give_the_same_tokens(model, prompts, attention):
  other = with_attention(model, attention=attention)
  requests = [Request(prompt, 9, GREEDY) for prompt in prompts]
  whole = run(ContinuousBatching(other, requests, slots=3))
  assert run(ContinuousBatching(other, requests, slots=2, prompt_chunk=8)) == whole


def test_kinds_that_read_whole_prompts_are_refused(model, prompts):
  other = with_attention(model, attention="minference")
  with pytest.raises(ValueError, match="'minference', which reads a prompt whole"):
    ContinuousBatching(other, [Request(prompts[0], 9)], slots=1, prompt_chunk=8)


def test_global_selection_reads_whole_prompts(model, prompts):
  other = with_attention(model, dga=DGAConfig(min_focal_tokens=4, group_size=5))
  with pytest.raises(ValueError, match=r"prompt_chunk is 8.*ranks a prompt's tokens together"):
    ContinuousBatching(other, [Request(prompts[0], 9)], slots=1, prompt_chunk=8)


def test_many_requests_leak_nothing_and_compile_nothing(model):
  rng = np.random.default_rng(1)
  requests = [
    Request(
      rng.integers(0, 61, rng.integers(1, 40)).tolist(),
      int(rng.integers(1, 12)),
      Sampling(temperature=float(rng.integers(0, 2)), top_k=int(rng.integers(0, 5)), seed=i),
    )
    for i in range(500)
  ]
  batch = ContinuousBatching(model, requests, slots=5, stop_ids=[7], prompt_chunk=16)
  compiled, seen = [], []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
  )
  for number, _ in enumerate(batch.steps()):
    if number in (20, 100):
      gc.collect()
      live = jax.live_arrays()
      seen.append((len(compiled), len(live), sum(x.nbytes for x in live)))
  # The first tokens of requests just admitted may wait to be read.
  assert seen[1][0] == seen[0][0] == len(compiled)
  assert abs(seen[1][1] - seen[0][1]) <= 10
  assert abs(seen[1][2] - seen[0][2]) <= 500
  for request, tokens in zip(requests, batch.result.tokens, strict=True):
    assert len(tokens) <= request.max_new_tokens
    assert 7 not in tokens
  for i in (0, 499):
    alone = ContinuousBatching(model, [requests[i]], slots=1, stop_ids=[7], prompt_chunk=16)
    assert run(alone) == [batch.result.tokens[i]]


def test_seeds_repeat_and_differ(model, prompts):
  how = [Sampling(temperature=1.0, top_p=0.9, seed=seed) for seed in (0, 0, 1)]
  requests = [Request(prompt, 12, one) for one in how for prompt in prompts[:2]]
  tokens = run(ContinuousBatching(model, requests, slots=3))
  assert tokens[:2] == tokens[2:4]
  assert tokens[:2] != tokens[4:]


def test_a_stop_token_ends_a_sequence(model, prompts):
  free = generate(model, prompts, max_new_tokens=20, sampling=GREEDY)
  end = free.tokens[1][3]
  stopped = generate(model, prompts, max_new_tokens=20, sampling=GREEDY, stop_ids=[end], slots=2)
  for tokens, until in zip(free.tokens, stopped.tokens, strict=True):
    assert until == (tokens[: tokens.index(end)] if end in tokens else tokens)
  assert 0 < free.cache_bytes < free.dense_cache_bytes
  assert " ms, then " in free.summary()
  dense = generate(
    with_attention(model, attention="dense"), prompts, max_new_tokens=2, sampling=GREEDY
  )
  assert dense.cache_bytes == dense.dense_cache_bytes
  # All requests end in the first step, so no time of a later step was measured.
  assert dense.summary().startswith("prefill and decoding ")


def test_steps_runs_the_requests_again(model, prompts):
  batch = ContinuousBatching(model, [Request(prompt, 11, GREEDY) for prompt in prompts], slots=2)
  interrupted = batch.steps()
  next(interrupted)
  interrupted.close()
  assert batch.result is None
  first = run(batch)
  assert [len(tokens) for tokens in first] == [11, 11, 11]
  assert run(batch) == first


@pytest.fixture(scope="module")
def overflowing(model):
  """A float16 model in which the embedding of token 7 overflows the first MLP."""
  overflowing = with_attention(model, dtype="float16")
  overflowing.embedding[...] = overflowing.embedding[...].at[7].set(6e4)
  overflowing.layers.mlp.down[...] = overflowing.layers.mlp.down[...] * 3e4
  return overflowing


def test_a_request_that_overflows_float16_ends_alone(overflowing):
  hot = Sampling(temperature=1.0)
  requests = [
    Request(prompt, 6, sampling)
    for prompt, sampling in (([1, 2], GREEDY), ([1, 7], GREEDY), ([3], hot), ([7], hot))
  ]
  result = ContinuousBatching(overflowing, requests, slots=2).run()
  assert result.failed == [False, True, False, True]
  assert [len(tokens) for tokens in result.tokens] == [6, 0, 6, 0]
  message = r"prompt 1 after 0 new tokens, prompt 3 after 0 new tokens\. .*float16.*65504"
  with pytest.raises(FloatingPointError, match=message):
    result.raise_if_failed()
  dataclasses.replace(result, failed=[False] * 4).raise_if_failed()


def test_generate_raises_for_logits_that_are_not_finite(overflowing):
  with pytest.raises(FloatingPointError, match="prompt 0 after 0 new tokens"):
    generate(overflowing, [[7]], max_new_tokens=1, sampling=GREEDY)


def test_weights_that_overflow_float16_are_refused(model):
  large = with_attention(model, dtype="float16")
  large.embedding[...] = large.embedding[...].at[0, 0].set(7e4)
  with pytest.raises(ValueError, match=r"float16.*embedding.*contains 70000; use dtype"):
    ContinuousBatching(large, [Request([1], 1)], slots=1)


@pytest.mark.parametrize(
  ("prompts", "options", "message"),
  [
    ([], {}, "There is no prompt"),
    ([[]], {}, "Prompt 0 has no tokens"),
    ([[3], [61]], {}, "Prompt 1 has token ids outside 0..60"),
    ([[1] * 30], {"max_length": 40}, "30 tokens; with max_new_tokens=20 it exceeds"),
    ([[1]], {"slots": 0}, "slots is 0"),
    ([[1]], {"prompt_chunk": 0}, "prompt_chunk is 0"),
    ([[1]], {"decode_chunk": 0}, "decode_chunk is 0"),
  ],
)
def test_bad_requests(model, prompts, options, message):
  requests = [Request(prompt, 20, GREEDY) for prompt in prompts]
  with pytest.raises(ValueError, match=message):
    ContinuousBatching(model, requests, **({"slots": 2} | options))
