"""Prefill and decode give the logits of the teacher-forced decoder, for each kind of cache."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dga_jax.config import DGAConfig
from dga_jax.model import Decoder, ModelConfig
from tests.dga_jax.model.random_decoder import random_decoder

CONFIG = ModelConfig(
  vocab_size=31,
  num_layers=2,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=24,
  attention="dense",
  dtype="float32",
)
B, PROMPT, NEW = 3, 8, 8
TOTAL = PROMPT + NEW
STREAMING = {
  "streaming": DGAConfig(selection="streaming", group_size=3),
  "streaming, sinks, window": DGAConfig(
    selection="streaming", group_size=2, focal_per_block=2, sink_tokens=3, local_window=1
  ),
}
GLOBAL = {"global": DGAConfig(group_size=2, importance_rate=0.25, min_focal_tokens=1)}
MODEL = random_decoder(CONFIG)
PROJECTIONS = random_decoder(dataclasses.replace(CONFIG, qkv_bias=True, qk_norm=True))
MODELS = {"dense": MODEL, "dense, bias and norm of the projections": PROJECTIONS} | {
  name: random_decoder(dataclasses.replace(CONFIG, attention="dga", dga=dga))
  for name, dga in (STREAMING | GLOBAL).items()
}
full = nnx.jit(Decoder.__call__)
prefill = nnx.jit(functools.partial(Decoder.prefill, max_length=TOTAL))
decode = nnx.jit(Decoder.decode)


def random_tokens(seed: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (B, TOTAL), dtype=np.int32)


@pytest.mark.parametrize("kind", STREAMING | {"dense": None})
@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, PROMPT), min_size=B, max_size=B), st.integers(0, 2**16))
def test_decoding_equals_teacher_forcing(kind: str, lengths: list[int], seed: int) -> None:
  model = MODELS[kind]
  tokens_BxL, lengths_B, row_B = random_tokens(seed), np.array(lengths), np.arange(B)
  expected_BxLxV = full(model, tokens_BxL)
  logits_BxV, cache = prefill(model, tokens_BxL[:, :PROMPT], lengths_B)
  np.testing.assert_allclose(logits_BxV, expected_BxLxV[row_B, lengths_B - 1], atol=2e-5)
  for step in range(NEW):
    position_B = lengths_B + step
    logits_BxV, cache = decode(model, tokens_BxL[row_B, position_B], cache)
    np.testing.assert_allclose(logits_BxV, expected_BxLxV[row_B, position_B], atol=2e-5)
    np.testing.assert_array_equal(cache.length, position_B + 1)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in GLOBAL])
def test_decoding_from_an_empty_cache(kind: str) -> None:
  model, tokens_BxL = MODELS[kind], random_tokens(0)
  expected_BxLxV = full(model, tokens_BxL)
  cache = model.init_cache(B, TOTAL)
  for position in range(TOTAL):
    logits_BxV, cache = decode(model, tokens_BxL[:, position], cache)
    np.testing.assert_allclose(logits_BxV, expected_BxLxV[:, position], atol=2e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_prompts_without_lengths_have_no_padding(kind: str) -> None:
  tokens_BxL = random_tokens(3)[:, :PROMPT]
  logits_BxV, cache = prefill(MODELS[kind], tokens_BxL)
  expected_BxLxV = full(MODELS[kind], tokens_BxL)
  np.testing.assert_allclose(logits_BxV, expected_BxLxV[:, -1], atol=2e-5)
  ragged_BxV, ragged_cache = prefill(MODELS[kind], tokens_BxL, np.full(B, PROMPT))
  np.testing.assert_allclose(ragged_BxV, logits_BxV, atol=2e-5)
  next_B = np.array([3, 1, 2])
  np.testing.assert_allclose(
    decode(MODELS[kind], next_B, cache)[0], decode(MODELS[kind], next_B, ragged_cache)[0], atol=2e-5
  )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_decoding_in_16_bit(dtype: str) -> None:
  model = random_decoder(dataclasses.replace(CONFIG, dtype=dtype))
  tokens_BxL, lengths_B = random_tokens(2), np.array([8, 1, 3])
  expected_BxLxV = full(MODEL, tokens_BxL)
  error = np.abs(full(model, tokens_BxL) - expected_BxLxV).max()
  _, cache = prefill(model, tokens_BxL[:, :PROMPT], lengths_B)
  next_B = tokens_BxL[np.arange(B), lengths_B]
  logits_BxV, cache = decode(model, next_B, cache)
  assert cache.layers.tokens.key.dtype == jnp.dtype(dtype)
  assert 0 < error < 0.1
  assert np.abs(logits_BxV - expected_BxLxV[np.arange(B), lengths_B]).max() < 2 * error


def test_padding_of_prompts_is_not_read() -> None:
  tokens_BxL, lengths_B = random_tokens(1)[:, :PROMPT], np.array([2, 8, 1])
  other_BxL = np.where(np.arange(PROMPT) < lengths_B[:, None], tokens_BxL, 30 - tokens_BxL)
  logits, cache = prefill(MODEL, tokens_BxL, lengths_B)
  other_logits, other_cache = prefill(MODEL, other_BxL, lengths_B)
  np.testing.assert_array_equal(logits, other_logits)
  next_B = np.array([3, 1, 2])
  np.testing.assert_array_equal(
    decode(MODEL, next_B, cache)[0], decode(MODEL, next_B, other_cache)[0]
  )


def test_shape_and_dtype_of_the_dense_cache() -> None:
  cache = MODEL.init_cache(B, TOTAL)
  shape = (CONFIG.num_layers, B, CONFIG.num_kv_heads, TOTAL, CONFIG.head_dim)
  assert cache.layers.tokens.key.shape == cache.layers.tokens.value.shape == shape
  assert cache.layers.tokens.key.dtype == jnp.float32


@pytest.mark.parametrize("kind", STREAMING | {"dense": None})
def test_decoding_updates_the_cache_in_place(kind: str) -> None:
  model = random_decoder(dataclasses.replace(MODELS[kind].config, num_layers=8))
  cache = jax.eval_shape(lambda: model.init_cache(B, 2048))
  donated = jax.jit(lambda c: model.decode(jnp.zeros(B, int), c)[1], donate_argnums=0)
  memory = donated.lower(cache).compile().memory_analysis()
  floats = [x for x in jax.tree.leaves(cache.layers) if x.dtype == jnp.float32]
  cache_bytes = sum(math.prod(x.shape) * 4 for x in floats)
  assert memory.alias_size_in_bytes >= cache_bytes
  # Temporary memory fits the keys and values of a few layers, but not of all eight.
  assert memory.temp_size_in_bytes < cache_bytes / 2


def test_a_prompt_longer_than_the_cache_is_an_error() -> None:
  tokens_BxL = random_tokens(0)
  with pytest.raises(ValueError, match=r"max_length is 15, but tokens hold prompts of up to 16"):
    nnx.eval_shape(lambda: MODEL.prefill(tokens_BxL, np.full(B, 2), max_length=15))


@pytest.mark.parametrize(("batch_size", "max_length"), [(0, 4), (2, 0)])
def test_empty_caches_are_errors(batch_size: int, max_length: int) -> None:
  with pytest.raises(ValueError, match=f"batch_size={batch_size}, max_length={max_length}"):
    MODEL.init_cache(batch_size, max_length)


@pytest.mark.invalid_arguments
def test_decode_takes_one_token_per_sequence() -> None:
  with pytest.raises(ValueError, match=r"tokens is \[3, 1\]; the cache wants \[3\]"):
    MODEL.decode(jnp.zeros((3, 1), int), MODEL.init_cache(3, 4))
