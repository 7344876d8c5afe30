"""Generation: what comes out does not depend on neighbours, padding or the path taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dga_jax import DGAConfig
from dga_jax.generation import generate, Generator
from dga_jax.model import Decoder, ModelConfig
from dga_jax.sampling import sample, Sampling

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


@pytest.fixture(scope="module")
def model():
  return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 61, n).tolist() for n in (1, 13, 40)]


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


@pytest.mark.parametrize("kind", ["dense", "streaming", "global"])
def test_greedy_tokens_do_not_depend_on_neighbours(model, prompts, kind):
  dga = CONFIG.dga
  if kind == "global":
    dga = DGAConfig(min_focal_tokens=4, group_size=5)
  config = dataclasses.replace(CONFIG, attention="dense" if kind == "dense" else "dga", dga=dga)
  other = nnx.merge(nnx.graphdef(Decoder(config, rngs=nnx.Rngs(0))), nnx.state(model))
  together = generate(other, prompts, max_new_tokens=20, sampling=GREEDY)
  for prompt, tokens in zip(prompts, together.tokens, strict=True):
    alone = generate(other, [prompt], max_new_tokens=20, sampling=GREEDY)
    assert alone.tokens == [tokens]
    assert len(tokens) == 20
  assert together.cache_bytes > 0
  if kind != "dense":
    assert together.cache_bytes < together.dense_cache_bytes
  else:
    assert together.cache_bytes == together.dense_cache_bytes


def test_seeds_repeat_and_differ(model, prompts):
  def tokens(seed):
    how = Sampling(temperature=1.0, top_p=0.9, seed=seed)
    return generate(model, prompts[:2], max_new_tokens=12, sampling=how).tokens

  assert tokens(0) == tokens(0)
  assert tokens(0) != tokens(1)


def test_the_end_token_ends_a_sequence_and_the_batch(model, prompts):
  free = generate(model, prompts, max_new_tokens=20, sampling=GREEDY).tokens
  end = free[1][3]
  steps = []
  generator = Generator(model, prompts, max_new_tokens=20, sampling=GREEDY, end_id=end)
  steps = list(generator.steps())
  for row, tokens in enumerate(free):
    stop = tokens.index(end) if end in tokens else 20
    assert generator.result.tokens[row] == tokens[:stop]
    assert [step[row] for step in steps[:stop]] == tokens[:stop]
    assert all(step[row] is None for step in steps[stop:])


def test_top_p_draws_from_the_nucleus_alone():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 2000))
  keys = Sampling(seed=1).keys(2000)
  drawn = np.asarray(sample(logits, keys, jnp.int32(0), Sampling(temperature=1.0, top_p=0.7)))
  assert set(drawn) == {0, 1}
  np.testing.assert_allclose((drawn == 0).mean(), 0.5 / 0.8, atol=0.04)


@pytest.mark.parametrize(
  ("prompts", "options", "message"),
  [
    ([], {}, "prompts is empty"),
    ([[]], {}, r"prompts\[0\] has no token"),
    ([[3], [61]], {}, r"prompts\[1\] holds ids outside 0..60"),
    ([[1] * 30], {"max_length": 40}, r"30 tokens; with max_new_tokens=20 it does not fit a cache"),
  ],
)
def test_bad_prompts(model, prompts, options, message):
  with pytest.raises(ValueError, match=message):
    Generator(model, prompts, max_new_tokens=20, sampling=GREEDY, **options)


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_sampling(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    Sampling(**options)
