"""Prefill and decoding with the compact cache, and the exact size of the cache."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dga_jax import DGAConfig, dynamic_group_attention
from dga_jax.cache import attend_and_prefill, cache_size, decode_step, empty_cache, prefill
from tests.dga_jax.attention.cases import arrays, CONFIGS
from tests.dga_jax.oracle import Oracle, softmax

TOTAL, PROMPT = 64, 32
forward = jax.jit(dynamic_group_attention, static_argnames="config")
STREAMING = [name for name in CONFIGS if name.startswith("streaming")]


LAYER = 1


def stack(cache):
  """A cache of three layers with `cache` in the middle and NaN in the other layers."""
  return jax.tree.map(lambda x: jnp.stack([jnp.full_like(x, _poison(x)), x, x + _poison(x)]), cache)


def _poison(x):
  return jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 10**6


@functools.partial(jax.jit, static_argnames="config")
def continue_from(q, k, v, lengths, *, config):
  """Prefills the first `lengths` tokens of each row and decodes the following ones.

  Returns:
    Outputs of the prefill and of decoding, [B, steps, H, D] each, and the cache.
  """
  B = q.shape[0]
  outside = jnp.arange(PROMPT)[None] >= lengths[:, None]
  prompt = [jnp.where(outside[..., None, None], jnp.nan, x[:, :PROMPT]) for x in (q, k, v)]
  out, cache = attend_and_prefill(*prompt, config=config, lengths=lengths, max_length=TOTAL)

  def step(cache, t):
    token = [x[jnp.arange(B), lengths + t] for x in (q, k, v)]
    o, cache = decode_step(*token, cache, config=config, layer=LAYER)
    return cache, o

  cache, decoded = jax.lax.scan(step, stack(cache), jnp.arange(TOTAL - PROMPT))
  return out, jnp.moveaxis(decoded, 0, 1), cache


@pytest.mark.parametrize("name", STREAMING)
@settings(max_examples=6)
@given(lengths=st.lists(st.integers(0, PROMPT), min_size=2, max_size=2), seed=st.integers(0, 9))
def test_streaming_prefill_equals_token_by_token_decoding(name, lengths, seed):
  """Holds for every prompt length and block phase, with sinks and local windows."""
  config = CONFIGS[name]
  q, k, v, _ = arrays(seed, 2, TOTAL, 4, 2, 4)
  want = forward(q, k, v, config=config)
  out, decoded, cache = continue_from(q, k, v, jnp.array(lengths), config=config)
  np.testing.assert_array_equal(cache.length[LAYER], np.array(lengths) + TOTAL - PROMPT)
  for b, length in enumerate(lengths):
    np.testing.assert_allclose(out[b, :length], want[b, :length], atol=1e-5)
    following = want[b, length : length + TOTAL - PROMPT]
    np.testing.assert_allclose(decoded[b], following, atol=1e-5)


class DecodingOracle:
  """The decode rule of one KV head in Python lists: compact entries and a buffer of raw tokens."""

  def __init__(self, oracle, n):
    self.c, self.n, self.o = oracle.config, n, oracle
    focal = sorted(oracle.focal(n))
    self.entries = [(oracle.k[j, n], oracle.v[j, n], 0.0) for j in focal]
    bias = np.log(self.c.group_size) if self.c.group_logit_bias == "log_size" else 0.0
    self.bias = bias
    for group in oracle.groups(set(focal)):
      self.entries.append((*oracle.merged(n, *group), bias))
    self.buffer = []

  def step(self, q_RxD, k, v):
    self.buffer.append((k, v, 0.0))
    keys, values, biases = (np.array(x) for x in zip(*self.entries, *self.buffer, strict=True))
    D = q_RxD.shape[-1]
    out = [softmax(keys @ q / np.sqrt(D) + biases) @ values for q in q_RxD]
    if len(self.buffer) == self.c.block_size:
      self.flush(q_RxD)
    return np.array(out)

  def flush(self, q_RxD):
    keys, values, _ = (np.array(x) for x in zip(*self.buffer, strict=True))
    D = q_RxD.shape[-1]
    scores = sum(softmax(keys @ q / np.sqrt(D)) for q in q_RxD)
    order = np.argsort(-scores, kind="stable")
    kept, rest = order[: self.c.focal_in_block], order[self.c.focal_in_block :]
    scale = D**-0.5 if self.c.aggregation_scale == "head_dim" else 1.0
    weights = np.mean([softmax(keys[rest] @ q * scale) for q in q_RxD], axis=0)
    self.entries += [(keys[j], values[j], 0.0) for j in kept]
    self.entries.append((weights @ keys[rest], weights @ values[rest], self.bias))
    self.buffer = []


@pytest.mark.parametrize("name", ["global", "global-no-complementary-bias", "random-sinks-bias"])
def test_decoding_after_a_global_prefill_follows_the_decode_rule(name):
  config = dataclasses.replace(CONFIGS[name], max_documents=None)
  q, k, v, _ = arrays(1, 2, TOTAL, 4, 2, 4)
  lengths = [32, 19]
  _, decoded, cache = continue_from(q, k, v, jnp.array(lengths), config=config)
  for b, length in enumerate(lengths):
    oracle = Oracle(q[b, :length], k[b, :length], v[b, :length], config)
    for n in range(2):
      rule = DecodingOracle(oracle, n)
      for t in range(TOTAL - PROMPT):
        i, heads = length + t, slice(2 * n, 2 * n + 2)
        token = [np.asarray(x, np.float64) for x in (q[b, i, heads], k[b, i, n], v[b, i, n])]
        np.testing.assert_allclose(decoded[b, t, heads], rule.step(*token), atol=1e-5)
      assert len(rule.entries) <= cache.arrays.compact_key.shape[-2]


def test_a_short_prompt_with_long_padding_can_grow_to_max_length():
  """Decoding to max_length drops no compact entry."""
  config = dataclasses.replace(CONFIGS["global-no-rate-m7"], max_documents=None)
  q, k, v, _ = arrays(1, 1, TOTAL, 2, 1, 4)
  prompt = [x[:, : TOTAL - 1] for x in (k, v, q)]
  cache = prefill(*prompt, config=config, max_length=TOTAL, lengths=[2])
  step = jax.jit(functools.partial(decode_step, config=config))
  rule = DecodingOracle(Oracle(q[0, :2], k[0, :2], v[0, :2], config), 0)
  for i in range(2, TOTAL):
    out, cache = step(q[:, i], k[:, i], v[:, i], cache)
    token = [np.asarray(x, np.float64) for x in (q[0, i], k[0, i, 0], v[0, i, 0])]
    np.testing.assert_allclose(out[0], rule.step(*token), atol=1e-5, err_msg=f"token {i}")


def test_a_prompt_shorter_than_the_sinks_is_completed_by_decoding():
  """No group is merged before the first complete block, so attention is dense until then."""
  config = dataclasses.replace(CONFIGS["global"], sink_tokens=6)
  q, k, v, _ = arrays(1, 2, TOTAL, 4, 2, 4)
  lengths = jnp.array([2, 0])
  _, decoded, _ = continue_from(q, k, v, lengths, config=config)
  dense = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  for b, length in enumerate((2, 0)):
    exact = 6 + config.block_size - length
    np.testing.assert_allclose(decoded[b, :exact], dense[b, length : length + exact], atol=1e-5)


def test_decoding_can_start_from_an_empty_cache():
  config = CONFIGS["streaming-sinks-window"]
  q, k, v, _ = arrays(0, 1, 40, 4, 2, 4)
  want = forward(q, k, v, config=config)
  cache = empty_cache(
    config=config, batch=1, max_length=40, num_kv_heads=2, head_dim=4, dtype=jnp.float32
  )
  cache, step = stack(cache), jax.jit(functools.partial(decode_step, config=config, layer=LAYER))
  for i in range(40):
    out, cache = step(q[:, i], k[:, i], v[:, i], cache)
    np.testing.assert_allclose(out, want[:, i], atol=1e-5)


@pytest.mark.parametrize("length", [4096, 8192, 16384, 32768])
def test_cache_size_equals_the_formula_and_the_arrays(length):
  config = DGAConfig(min_focal_tokens=0)
  streaming = dataclasses.replace(config, selection="streaming")
  r = int(config.focal_quota(length)[length])
  size = functools.partial(cache_size, max_length=length, prompt=length)
  assert size(config=config).total == r + (length - r) // 16 + 18
  assert size(config=streaming).total == 3 * (length // 18) + 18
  x = jax.ShapeDtypeStruct((2, length, 4, 64), jnp.bfloat16)
  for c in (config, streaming):
    fill = functools.partial(prefill, config=c, max_length=length)
    cache = jax.eval_shape(fill, x, x, x)
    total = size(config=c).total
    assert cache.arrays.compact_key.shape[2] + cache.arrays.raw_key.shape[2] == total
    assert cache.bytes == 2 * 2 * total * 4 * 64 * 2


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.causal])
def test_size_covers_every_ragged_prompt(name):
  """The size of a ragged batch is the largest size over all prompt lengths, without spare."""
  size = functools.partial(cache_size, config=CONFIGS[name], max_length=3 * TOTAL)
  alone = [size(prompt=length).compact for length in range(2 * TOTAL)]
  assert max(alone) == size(prompt=2 * TOTAL - 1, ragged=True).compact


@pytest.mark.parametrize(("dtype", "largest_error"), [("int8", 0.02), ("float8_e4m3fn", 0.06)])
def test_a_cache_in_8_bits_is_half_as_large_and_nearly_as_exact(dtype, largest_error):
  exact = dataclasses.replace(CONFIGS[STREAMING[0]], sink_tokens=2)
  config = dataclasses.replace(exact, cache_dtype=dtype)
  D = 32
  q, k, v, _ = arrays(0, 2, TOTAL, 4, 2, D)
  lengths = jnp.array([PROMPT, 5])
  _, want, _ = continue_from(q, k, v, lengths, config=exact)
  _, decoded, cache = continue_from(q, k, v, lengths, config=config)
  error = np.linalg.norm(decoded - want) / np.linalg.norm(want)
  assert 1e-4 < error < largest_error
  size = cache_size(config=config, max_length=TOTAL)
  rows = 2 * 3 * 2 * 2  # Keys and values, layers of `stack`, sequences, heads.
  assert cache.bytes == rows * (size.compact * (D + 4) + size.raw * D * 4)
