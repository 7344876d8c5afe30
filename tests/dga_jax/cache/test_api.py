"""The cache functions on one layer, used without the `Decoder`."""

import dataclasses
import doctest
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dga_jax.cache
from dga_jax import DGAConfig, dynamic_group_attention
from dga_jax.cache import (
  attend_and_prefill,
  cache_size,
  decode_step,
  empty_cache,
  extend,
  prefill,
)

B, L, H, N, D = 2, 12, 4, 2, 8
CONFIG = DGAConfig(selection="streaming", group_size=3, focal_per_block=2, sink_tokens=1)
GLOBAL = DGAConfig(group_size=3, min_focal_tokens=2, sink_tokens=1)


def tokens(*shape, dtype=jnp.float32):
  """Random query, key and value [*shape, heads, D]."""
  keys = jax.random.split(jax.random.key(0), 3)
  return [jax.random.normal(k, (*shape, h, D), dtype) for k, h in zip(keys, (H, N, N), strict=True)]


def filled(config=CONFIG, max_length=20, lengths=None):
  query, key, value = tokens(B, L)
  return prefill(key, value, query, config=config, max_length=max_length, lengths=lengths)


def assert_equal(tree, want):
  assert jax.tree.structure(tree) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, tree, want)


def test_the_example_in_the_package_docstring_runs():
  result = doctest.testmod(dga_jax.cache)
  assert result.attempted > 10
  assert result.failed == 0


def test_no_public_name_shadows_a_module():
  for name in dga_jax.cache.__all__:
    assert not isinstance(getattr(dga_jax.cache, name), types.ModuleType)
    with pytest.raises(ModuleNotFoundError):
      __import__(f"dga_jax.cache.{name}")


@pytest.mark.parametrize("config", [CONFIG, GLOBAL], ids=["streaming", "global"])
@pytest.mark.parametrize("lengths", [None, [12, 5]])
def test_prefill_returns_the_cache_of_attend_and_prefill(config, lengths):
  query, key, value = tokens(B, L)
  out, cache = attend_and_prefill(query, key, value, config=config, max_length=20, lengths=lengths)
  assert_equal(filled(config, lengths=lengths), cache)
  lengths = None if lengths is None else jnp.array(lengths)
  want = dynamic_group_attention(query, key, value, config=config, lengths=lengths)
  np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("lengths", [[12, 5], np.array([12, 5]), jnp.array([12, 5])])
def test_lengths_may_be_a_list_or_an_array(lengths):
  assert filled(lengths=lengths).length.tolist() == [12, 5]
  assert jax.jit(lambda: filled(lengths=lengths))().length.tolist() == [12, 5]


@pytest.mark.parametrize("config", [CONFIG, GLOBAL], ids=["streaming", "global"])
def test_one_layer_equals_a_layer_of_a_stacked_cache(config):
  """`decode_step` accepts and returns the cache of `prefill` without a reshape."""
  one = filled(config)
  stacked = jax.tree.map(lambda x: jnp.stack([jnp.zeros_like(x), x, x]), one)
  step = jax.jit(functools.partial(decode_step, config=config), static_argnames="layer")
  for _ in range(6):
    token = tokens(B)
    out, one = step(*token, one)
    want, stacked = step(*token, stacked, layer=1)
    np.testing.assert_array_equal(out, want)
  assert_equal(one, jax.tree.map(lambda x: x[1], stacked))
  assert one.length.tolist() == [18, 18]


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_new_caches_can_be_donated(cache_dtype):
  """No two arrays of a new cache share a buffer, which donation would reject."""
  config = dataclasses.replace(CONFIG, cache_dtype=cache_dtype)
  step = jax.jit(functools.partial(decode_step, config=config), donate_argnums=3)
  empty = empty_cache(
    config=config, batch=B, max_length=20, num_kv_heads=N, head_dim=D, dtype=jnp.float32
  )
  for cache in (empty, filled(config), filled(config, lengths=[3, 12])):
    before = cache.length
    after = np.asarray(before) + 1
    _, cache = step(*tokens(B), cache)
    assert before.is_deleted()
    np.testing.assert_array_equal(cache.length, after)


def test_tokens_beyond_max_length_are_an_error_if_lengths_are_concrete():
  cache = filled(max_length=13)
  _, full = decode_step(*tokens(B), cache, config=CONFIG)
  with pytest.raises(ValueError, match=r"lengths reach 14 tokens .* max_length=13"):
    decode_step(*tokens(B), full, config=CONFIG)
  with pytest.raises(ValueError, match=r"lengths reach 14 tokens .* max_length=13"):
    extend(*tokens(B, 4), cache, config=CONFIG, lengths=[1, 2])
  out, _ = extend(*tokens(B, 4), cache, config=CONFIG, lengths=[1, 0])
  assert np.isfinite(out).all()
  with pytest.raises(ValueError, match="max_length is 11, but key holds prompts of up to 12"):
    filled(max_length=11)


def test_more_tokens_than_max_length_are_refused_under_jit():
  cache = filled()
  call = jax.jit(functools.partial(extend, config=CONFIG))
  with pytest.raises(ValueError, match=r"lengths reach 21 tokens .* max_length=20"):
    call(*tokens(B, 21), cache)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_64_bit_types_may_be_enabled(dtype):
  query, key, value = tokens(B, L)
  want = dynamic_group_attention(query, key, value, config=CONFIG)
  with jax.enable_x64(True):
    query, key, value = (jnp.asarray(np.asarray(x), dtype) for x in (query, key, value))
    out = dynamic_group_attention(query, key, value, config=CONFIG)
    first = [x[:, :7] for x in (query, key, value)]
    outs, cache = attend_and_prefill(*first, config=CONFIG, max_length=20, lengths=[7, 7])
    new = [x[:, 7:11] for x in (query, key, value)]
    more, cache = extend(*new, cache, config=CONFIG, lengths=[4, 4])
    last, cache = decode_step(query[:, 11], key[:, 11], value[:, 11], cache, config=CONFIG)
    outs = jnp.concatenate([outs, more, last[:, None]], axis=1)
    assert out.dtype == outs.dtype == dtype
    assert cache.length.dtype == jnp.int32
  np.testing.assert_allclose(out, want, atol=1e-5)
  np.testing.assert_allclose(outs, want, atol=1e-5)


def test_a_token_may_keep_the_axis_of_length():
  query, key, value = tokens(B, L + 1)
  cache = prefill(key[:, :L], value[:, :L], query[:, :L], config=CONFIG, max_length=20)
  step = jax.jit(functools.partial(decode_step, config=CONFIG))
  out, after = step(query[:, L:], key[:, L:], value[:, L:], cache)
  want, same = step(query[:, L], key[:, L], value[:, L], cache)
  assert out.shape == (B, 1, H, D)
  np.testing.assert_array_equal(out[:, 0], want)
  assert_equal(after, same)


# Each changes numbers. No array of a cache shows the changes of the second line.
OTHER_SETTINGS = [
  {"local_window": 1}, {"selector": "fitted"}, {"cache_dtype": "int8"}, {"focal_per_block": 1},
  {"group_size": 4, "focal_per_block": 1}, {"sink_tokens": 2}, {"aggregation_scale": "none"},
  {"group_logit_bias": "log_size"},
]  # fmt: skip


@pytest.mark.invalid_arguments
@pytest.mark.parametrize("changes", OTHER_SETTINGS, ids=lambda changes: next(iter(changes)))
def test_the_config_of_another_cache_is_an_error_with_the_field(changes):
  cache, other = filled(), dataclasses.replace(CONFIG, **changes)
  (name, value), *_ = changes.items()
  field = name.replace("per", "in")
  match = rf"config\.{field} is {value!r}, and the cache was made with .*; pass the config"
  stacked = jax.tree.map(lambda x: jnp.stack([x, x]), cache)
  calls = {
    "step": lambda: decode_step(*tokens(B), cache, config=other),
    "jit": lambda: jax.jit(functools.partial(decode_step, config=other))(*tokens(B), cache),
    "extend": lambda: extend(*tokens(B, 3), cache, config=other),
    "layer": lambda: decode_step(*tokens(B), stacked, config=other, layer=1),
    "scan": lambda: jax.lax.scan(
      lambda c, t: decode_step(*t, c, config=other)[::-1], cache, tokens(3, B)
    ),
    "vmap": lambda: jax.vmap(lambda c: decode_step(*tokens(B), c, config=other)[0])(stacked),
  }
  for call in calls.values():
    with pytest.raises(ValueError, match=match):
      call()


def test_settings_that_choose_the_prefix_of_a_prompt_alone_may_differ():
  """Decoding after global selection depends on neither the selection nor its ranking."""
  same = dataclasses.replace(CONFIG, min_focal_tokens=7, seed=1, focal_per_block=2, max_documents=1)
  rate = dataclasses.replace(CONFIG, focal_per_block=None, importance_rate=0.7)
  assert rate.focal_in_block == CONFIG.focal_in_block
  want, after = decode_step(*tokens(B), filled(), config=CONFIG)
  for config in (same, rate):
    out, cache = decode_step(*tokens(B), filled(config), config=config)
    np.testing.assert_array_equal(out, want)
    assert_equal(cache, after)


@pytest.mark.invalid_arguments
def test_invalid_shapes_and_dtypes_are_errors_with_the_name():
  query, key, value = tokens(B)
  cache = filled()
  step = functools.partial(decode_step, config=CONFIG)
  for argument, match in (
    ((query[:1], key, value), r"query has shape \[1, 4, 8\]; it must be \[B, H, D\] with B = 2"),
    ((query[:, None], key, value), r"query has shape \[2, 1, 4, 8\]; it must be \[B, H, D\]"),
    ((query[:, :3], key, value), "H a multiple of its 2 KV heads"),
    ((query, key[:, :1], value), r"key is float32\[2, 1, 8\]; .* must be float32\[2, 2, 8\]"),
    ((query, key, value.astype("bfloat16")), r"value is bfloat16\[2, 2, 8\]"),
  ):
    with pytest.raises(ValueError, match=match):
      step(*argument, cache)
  with pytest.raises(ValueError, match=r"layer is 0 and .*pass layer for a cache with a leading"):
    step(query, key, value, cache, layer=0)
  stacked = jax.tree.map(lambda x: jnp.stack([x, x]), cache)
  for layer in (-1, 2):
    with pytest.raises(ValueError, match=f"layer is {layer}, and the cache has 2 layers"):
      step(query, key, value, stacked, layer=layer)
  with pytest.raises(ValueError, match=r"lengths is int.*; it must be int"):
    filled(lengths=[1, 2, 3])
  with pytest.raises(ValueError, match="lengths has values from 5 to 13"):
    filled(lengths=[5, 13])
  with pytest.raises(ValueError, match=r"'batch': 0.*every size must be at least 1"):
    empty_cache(config=CONFIG, batch=0, max_length=1, num_kv_heads=1, head_dim=1, dtype="float32")
  with pytest.raises(ValueError, match="max_length=3 and prompt=4"):
    cache_size(config=CONFIG, max_length=3, prompt=4)
