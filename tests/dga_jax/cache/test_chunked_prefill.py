"""Chunked prefill gives the outputs and the cache of one prefill, for chunks of any size."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dga_jax import DGAConfig
from dga_jax.cache import attend_and_prefill, decode_step, empty_cache, extend

B, N, H, D = 2, 2, 4, 8
STREAMING = DGAConfig(selection="streaming", group_size=3, focal_per_block=2)


# Jitted, because otherwise each new length compiles every operation on its own.
extend_jit = jax.jit(extend, static_argnames="config")
prefill_jit = jax.jit(attend_and_prefill, static_argnames=("config", "max_length"))
decode_jit = jax.jit(decode_step, static_argnames="config")


def empty(config, max_length):
  return empty_cache(
    config=config,
    batch=B,
    max_length=max_length,
    num_kv_heads=N,
    head_dim=D,
    dtype=jnp.float32,
  )


def draw(seed, length):
  keys = jax.random.split(jax.random.key(seed), 3)
  return [jax.random.normal(k, (B, length, h, D)) for k, h in zip(keys, (H, N, N), strict=True)]


def read_chunks(arrays, cache, config, cuts, pad):
  """Feeds the chunks between `cuts`, each with `pad` tokens of padding, through `extend`.

  Returns:
    The outputs of all chunks, and the cache.
  """
  outs, length = [], arrays[0].shape[1]
  for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
    free = ((0, 0), (0, pad), (0, 0), (0, 0))
    # The value of the padding must not change the result.
    chunk = [jnp.pad(x[:, begin:end], free, constant_values=7.0) for x in arrays]
    out, cache = extend_jit(*chunk, cache, config=config, lengths=jnp.full(B, end - begin))
    assert not np.asarray(out[:, end - begin :]).any()
    outs.append(out[:, : end - begin])
  return jnp.concatenate(outs, axis=1), cache


def assert_same_cache(cache, want):
  assert jax.tree.structure(cache) == jax.tree.structure(want)
  leaves = jax.tree_util.tree_leaves_with_path(cache)
  for (path, got), wanted in zip(leaves, jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(got, wanted, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@settings(max_examples=4)
@given(
  seed=st.integers(0, 99),
  sinks=st.sampled_from([0, 2, 7]),
  window=st.sampled_from([0, 1, 3]),
  bias=st.sampled_from(["none", "log_size"]),
  cuts=st.lists(st.integers(1, 31), max_size=3, unique=True).map(sorted),
  pad=st.sampled_from([0, 4]),
)
def test_chunks_equal_one_prefill(seed, sinks, window, bias, cuts, pad):
  config = dataclasses.replace(
    STREAMING, sink_tokens=sinks, local_window=window, group_logit_bias=bias
  )
  arrays = draw(seed, 32)
  want, whole = prefill_jit(*arrays, config=config, max_length=40)
  out, cache = read_chunks(arrays, empty(config, 40), config, cuts, pad)
  np.testing.assert_allclose(out, want, atol=1e-5)
  assert_same_cache(cache, whole)


@pytest.mark.parametrize(
  "config",
  [
    dataclasses.replace(STREAMING, sink_tokens=4, local_window=1),
    DGAConfig(group_size=4, min_focal_tokens=3, group_logit_bias="log_size"),
    DGAConfig(group_size=4, min_focal_tokens=3),
  ],
  ids=["streaming", "global_bias", "global"],
)
def test_extending_by_a_second_turn_equals_decoding_it(config):
  first, second = draw(0, 23), draw(1, 17)
  lengths = jnp.array([23, 9])
  _, begun = attend_and_prefill(*first, config=config, lengths=lengths, max_length=48)
  out, cache = read_chunks(second, begun, config, [6], 2)
  decoded = begun
  for t in range(17):
    want, decoded = decode_jit(*(x[:, t] for x in second), decoded, config=config)
    np.testing.assert_allclose(out[:, t], want, atol=1e-5, err_msg=f"token {t}")
  # Decoding does not clear ring slots that no query sees, so the arrays of the caches may differ.
  # The next token must get the same output from both caches.
  then = [x[:, 0] for x in draw(2, 1)]
  want, _ = decode_jit(*then, decoded, config=config)
  out, _ = decode_jit(*then, cache, config=config)
  np.testing.assert_allclose(out, want, atol=1e-5)


def test_each_sequence_is_extended_by_its_own_length():
  config = dataclasses.replace(STREAMING, sink_tokens=2)
  arrays = draw(2, 20)
  before = empty(config, 32)
  out, cache = extend(*arrays, before, config=config, lengths=[20, 0])
  want, whole = attend_and_prefill(*arrays, config=config, max_length=32)
  np.testing.assert_allclose(out[0], want[0], atol=1e-5)
  assert_same_cache(*(jax.tree.map(lambda x: x[0], c) for c in (cache, whole)))
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1], y[1]), cache, before)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_of_a_stacked_cache_is_extended_alone(layer):
  config = dataclasses.replace(STREAMING, local_window=1)
  arrays, before = draw(3, 11), empty(config, 32)
  want, one = extend_jit(*arrays, before, config=config)
  stacked = jax.tree.map(lambda x: jnp.stack([x] * 3), before)
  out, stacked = extend_jit(*arrays, stacked, config=config, layer=layer)
  np.testing.assert_array_equal(out, want)
  for index in range(3):
    wanted = one if index == layer else before
    got = jax.tree.map(operator.itemgetter(index), stacked)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
