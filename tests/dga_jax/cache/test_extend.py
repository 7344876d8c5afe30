"""Chunks of any sizes into the cache: outputs and entries of a prefill, and of decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dga_jax import DGAConfig
from dga_jax.cache import decode_step, empty_cache, extend, prefill

B, N, H, D = 2, 2, 4, 8
STREAMING = DGAConfig(selection="streaming", group_size=3, focal_per_block=2)


# Whole, since operation by operation every new length compiles each of them.
extend_jit = jax.jit(extend, static_argnames="config")
prefill_jit = jax.jit(prefill, static_argnames=("config", "max_length"))
decode_jit = jax.jit(decode_step, static_argnames="config")


def draw(seed, length):
  keys = jax.random.split(jax.random.key(seed), 3)
  return [jax.random.normal(k, (B, length, h, D)) for k, h in zip(keys, (H, N, N), strict=True)]


def read_chunks(arrays, cache, config, cuts, pad):
  """Outputs in a row, and the cache; what lies in the padding must not matter."""
  outs, length = [], arrays[0].shape[1]
  for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
    free = ((0, 0), (0, pad), (0, 0), (0, 0))
    piece = [jnp.pad(x[:, begin:end], free, constant_values=7.0) for x in arrays]
    out, cache = extend_jit(*piece, cache, config=config, count_B=jnp.full(B, end - begin))
    assert not np.asarray(out[:, end - begin :]).any()
    outs.append(out[:, : end - begin])
  return jnp.concatenate(outs, axis=1), cache


def assert_same_cache(cache, want):
  for field in dataclasses.fields(cache):
    got, wanted = getattr(cache, field.name), getattr(want, field.name)
    if got is None and wanted is None:  # scales of a cache in 8 bits
      continue
    np.testing.assert_allclose(got, wanted, atol=1e-6, err_msg=field.name)


@settings(max_examples=12)
@given(
  seed=st.integers(0, 99),
  sinks=st.sampled_from([0, 2, 7]),
  window=st.sampled_from([0, 1, 3]),
  bias=st.sampled_from(["none", "log_size"]),
  cuts=st.lists(st.integers(1, 31), max_size=3, unique=True).map(sorted),
  pad=st.sampled_from([0, 4]),
)
def test_chunks_equal_a_prefill(seed, sinks, window, bias, cuts, pad):
  config = dataclasses.replace(
    STREAMING, sink_tokens=sinks, local_window=window, group_logit_bias=bias
  )
  arrays = draw(seed, 32)
  want, whole = prefill_jit(*arrays, config=config, lengths_B=None, max_length=40)
  out, cache = read_chunks(arrays, empty_cache(config, B, 40, N, D, jnp.float32), config, cuts, pad)
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
def test_a_second_turn_equals_decoding_it(config):
  first, second = draw(0, 23), draw(1, 17)
  lengths = jnp.array([23, 9])
  _, begun = prefill(*first, config, lengths_B=lengths, max_length=48)
  out, cache = read_chunks(second, begun, config, [6], 2)
  stacked = jax.tree.map(lambda x: x[None], begun)
  for t in range(17):
    want, stacked = decode_jit(*(x[:, t] for x in second), stacked, 0, config=config)
    np.testing.assert_allclose(out[:, t], want, atol=1e-5, err_msg=f"token {t}")
  # Decoding leaves what has left the window in the ring. Both go on alike.
  then = [x[:, 0] for x in draw(2, 1)]
  want, _ = decode_jit(*then, stacked, 0, config=config)
  out, _ = decode_jit(*then, jax.tree.map(lambda x: x[None], cache), 0, config=config)
  np.testing.assert_allclose(out, want, atol=1e-5)


def test_each_sequence_takes_its_own_number_of_tokens():
  config = dataclasses.replace(STREAMING, sink_tokens=2)
  arrays = draw(2, 20)
  counts = jnp.array([20, 0])
  empty = empty_cache(config, B, 32, N, D, jnp.float32)
  out, cache = extend(*arrays, empty, config, count_B=counts)
  want, whole = prefill(*arrays, config, lengths_B=None, max_length=32)
  np.testing.assert_allclose(out[0], want[0], atol=1e-5)
  for field in dataclasses.fields(cache):
    got = getattr(cache, field.name)
    if got is None:  # scales of a cache in 8 bits
      continue
    np.testing.assert_allclose(got[0], getattr(whole, field.name)[0], atol=1e-6)
    np.testing.assert_array_equal(got[1], getattr(empty, field.name)[1], err_msg=field.name)
