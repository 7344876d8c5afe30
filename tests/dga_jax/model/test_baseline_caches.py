"""Caches of the baselines: sizes, memory, gradients, budgets and invalid settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dga_jax.model import mean_keys
from dga_jax.model.attention_kinds.kv_merger import KVMergerConfig
from dga_jax.model.attention_kinds.lm_infinite import LMInfiniteConfig
from dga_jax.model.attention_kinds.minference import MInferenceConfig
from dga_jax.model.attention_kinds.sliding_window import SlidingWindowConfig
from dga_jax.model.attention_kinds.streaming_llm import StreamingLLMConfig
from dga_jax.model.attention_kinds.top_k_eviction import TopKEvictionConfig
from tests.dga_jax.model.baseline_cases import (
  B,
  CAUSAL,
  CONFIG,
  D,
  H,
  kind_of,
  KINDS,
  L,
  N,
  prefill,
  PROMPT,
  tokens_of,
)
from tests.dga_jax.model.random_decoder import random_decoder

QKV = tuple(
  jnp.asarray(np.random.default_rng(0).normal(size=(B, L, heads, D)), jnp.float32)
  for heads in (H, N, N)
)
ENTRIES = {
  "sliding_window": 5,
  "streaming_llm": 7,
  "lm_infinite": 7,
  "top_k_eviction": 7,
  "kv_merger": 10,
  "minference": 40,
}


@pytest.mark.parametrize("name", KINDS)
def test_caches_have_the_number_of_entries_of_their_settings(name: str) -> None:
  model = random_decoder(dataclasses.replace(CONFIG, attention=name))
  cache = model.init_cache(B, 40)
  _, prompt = prefill(model, tokens_of(2)[:, :PROMPT], np.array([13, 2, 8]))
  for layers, entries in ((cache.layers, ENTRIES[name]), (prompt.layers, min(23, ENTRIES[name]))):
    wide = [x for x in jax.tree.leaves(layers) if x.ndim == 5]
    assert {x.shape[-1] for x in wide} == {D}
    assert sum(x.shape[-2] for x in wide) == 2 * entries


@pytest.mark.parametrize("name", KINDS)
def test_decoding_updates_the_cache_in_place(name: str) -> None:
  config = dataclasses.replace(
    CONFIG,
    attention=name,
    num_layers=8,
    sliding_window=SlidingWindowConfig(512),
    streaming_llm=StreamingLLMConfig(window=512),
    lm_infinite=LMInfiniteConfig(local_window=512),
    top_k_eviction=TopKEvictionConfig(256, 256),
    kv_merger=KVMergerConfig(512, 32, 64),
  )
  model = random_decoder(config)
  cache = jax.eval_shape(lambda: model.init_cache(B, 1024))
  donated = jax.jit(lambda c: model.decode(jnp.zeros(B, int), c)[1], donate_argnums=0)
  memory = donated.lower(cache).compile().memory_analysis()
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache) if x.ndim == 5)
  assert memory.alias_size_in_bytes >= size
  # Temporary memory fits the arrays of a few layers, but not a copy of all layers.
  assert memory.temp_size_in_bytes < size / 2


@pytest.mark.parametrize("name", KINDS)
def test_whole_sequences_need_no_array_of_length_squared(name: str) -> None:
  length = 4096
  small = dataclasses.replace(
    CONFIG,
    attention=name,
    num_heads=1,
    num_kv_heads=1,
    sliding_window=SlidingWindowConfig(64),
    streaming_llm=StreamingLLMConfig(window=64),
    lm_infinite=LMInfiniteConfig(local_window=64),
    top_k_eviction=TopKEvictionConfig(32, 32),
    kv_merger=KVMergerConfig(64, 4, 8),
  )
  x = jax.ShapeDtypeStruct((1, length, 1, D), jnp.float32)
  memory = jax.jit(small.make_attention()).lower(x, x, x).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * length**2 / 2


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_finite_and_padding_is_not_read(name: str) -> None:
  lengths = jnp.array([23, 1, 12])
  token = np.arange(L)[None, :, None, None] < np.asarray(lengths)[:, None, None, None]

  def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return (kind_of(name)(q, k, v, lengths=lengths) ** 2).sum()

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*QKV)
  for gradient in gradients:
    assert np.isfinite(gradient).all()
    assert np.abs(np.where(token, gradient, 0)).max() > 0
    assert not np.where(token, 0, gradient).any()


@pytest.mark.parametrize("name", ["minference", "top_k_eviction", "kv_merger"])
def test_kinds_without_packed_documents_raise(name: str) -> None:
  with pytest.raises(ValueError, match=f"segment_ids are given, but attention='{name}'"):
    kind_of(name)(*QKV, segment_ids=jnp.zeros((B, L), int))


@pytest.mark.parametrize("name", CAUSAL)
def test_mean_keys_equals_a_count_over_queries(name: str) -> None:
  settings = getattr(CONFIG, name)
  seen = []
  for i in range(50):
    if name in ("top_k_eviction", "kv_merger"):
      budget = 5 if name == "top_k_eviction" else 7
      seen.append(
        min(i // settings.interval * settings.interval, budget) + i % settings.interval + 1
      )
    else:
      seen.append(min(i + 1, ENTRIES[name]))
  assert mean_keys(dataclasses.replace(CONFIG, attention=name), 50) == pytest.approx(np.mean(seen))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("keys", [40, 701])
def test_with_budget_gives_a_cache_of_that_many_keys(name: str, keys: int) -> None:
  settings = type(getattr(CONFIG, name))().with_budget(keys)
  if name == "minference":
    assert settings.vertical + settings.slash == keys
    return
  config = dataclasses.replace(CONFIG, attention=name, **{name: settings})
  cache = config.make_attention().init_cache(1, 4096, 1, 8, jnp.float32)
  assert sum(x.shape[2] for x in jax.tree.leaves(cache) if x.ndim == 4) == 2 * keys


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: SlidingWindowConfig(0), r"SlidingWindowConfig\.window is 0.*at least 1"),
    (lambda: StreamingLLMConfig(sinks=-1), r"StreamingLLMConfig\.sinks is -1"),
    (lambda: LMInfiniteConfig(local_window=2.0), r"local_window is 2\.0"),
    (lambda: MInferenceConfig(vertical=10), r"first_tokens is 30.*at most vertical=10"),
    (lambda: TopKEvictionConfig(0, 0), r"heavy \+ recent is 0"),
    (lambda: TopKEvictionConfig(dense_prompt=1), r"dense_prompt is 1; it must be of type bool"),
    (lambda: KVMergerConfig(budget=100, heavy=30, recent=40), r"budget is 100.*at least .* 101"),
    (lambda: StreamingLLMConfig().with_budget(4), r"keys is 4.*at least 5"),
    (lambda: TopKEvictionConfig().with_budget(1), r"keys is 1.*at least 2"),
  ],
)
def test_invalid_settings_are_errors(make, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    make()
