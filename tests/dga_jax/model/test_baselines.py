"""The baselines against their papers' rules written out token by token, and through the decoder."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dga_jax.model import Decoder, mean_keys, ModelConfig
from dga_jax.model.attention_kinds import AttentionKind, make_attention
from dga_jax.model.baselines import (
  KVMergerConfig,
  LMInfiniteConfig,
  MInferenceConfig,
  SlidingWindowConfig,
  StreamingLLMConfig,
  TopKEvictionConfig,
)
from tests.dga_jax.model.random_decoder import random_decoder

CONFIG = ModelConfig(
  vocab_size=31,
  num_layers=2,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=24,
  rope_base=100.0,
  dtype="float32",
  sliding_window=SlidingWindowConfig(window=5),
  streaming_llm=StreamingLLMConfig(sinks=3, window=4),
  lm_infinite=LMInfiniteConfig(global_tokens=3, local_window=4),
  minference=MInferenceConfig(
    vertical=4, slash=5, last_queries=3, first_tokens=1, recent_distances=2
  ),
  top_k_eviction=TopKEvictionConfig(heavy=3, recent=2, interval=2),
  kv_merger=KVMergerConfig(budget=7, heavy=1, recent=3, interval=3),
)
B, L, H, N, D = 3, 23, 4, 2, 8
R = H // N
CAUSAL = ("sliding_window", "streaming_llm", "lm_infinite", "top_k_eviction", "kv_merger")
KINDS = (*CAUSAL, "minference")


def kind_of(name: str) -> AttentionKind:
  return make_attention(dataclasses.replace(CONFIG, attention=name))


def attend(name: str, qkv: tuple, **rows) -> np.ndarray:
  rows = {"segment_ids": None, "lengths": None} | rows
  return np.asarray(jax.jit(kind_of(name).attend)(*qkv, **rows))


def turn(x_D: np.ndarray, positions: int) -> np.ndarray:
  """RoPE by complex numbers: channel c is the real part of a number, c + D/2 its imaginary."""
  half = len(x_D) // 2
  angle = positions * CONFIG.rope_base ** (-np.arange(half) / half)
  z = (x_D[:half] + 1j * x_D[half:]) * np.exp(1j * angle)
  return np.concatenate([z.real, z.imag])


@pytest.fixture(scope="module")
def plain() -> tuple[np.ndarray, ...]:
  """Queries, keys and values without RoPE."""
  rng = np.random.default_rng(0)
  return tuple(rng.normal(size=(B, L, heads, D)) for heads in (H, N, N))


@pytest.fixture(scope="module")
def rotated(plain: tuple[np.ndarray, ...]) -> tuple[jax.Array, ...]:
  q, k, v = plain
  q, k = (
    np.stack([[[turn(x, i) for x in row[i]] for i in range(L)] for row in rows]) for rows in (q, k)
  )
  return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


def softmax(x: np.ndarray) -> np.ndarray:
  weights = np.exp(x - x.max())
  return weights / weights.sum()


def by_distance(
  plain: tuple[np.ndarray, ...], b: int, h: int, i: int, distances: dict
) -> np.ndarray:
  """Attention of query i to the keys of `distances`, each at the distance that stands there."""
  q, k, v = plain
  keys = sorted(distances)
  logits = [turn(q[b, i, h], distances[j]) @ k[b, j, h // R] / math.sqrt(D) for j in keys]
  return softmax(np.array(logits)) @ v[b, keys, h // R]


def sliding_window(i: int) -> dict[int, int]:
  return {j: i - j for j in range(i + 1) if i - j < 5}


def streaming_llm(i: int) -> dict[int, int]:
  cache = [j for j in range(i + 1) if j < 3 or i - j < 4]
  return {j: len(cache) - 1 - place for place, j in enumerate(cache)}


def lm_infinite(i: int) -> dict[int, int]:
  return {j: min(i - j, 4) for j in range(i + 1) if j < 3 or i - j < 4}


@pytest.mark.parametrize("rule", [sliding_window, streaming_llm, lm_infinite])
def test_windows_follow_their_papers(rule, plain, rotated) -> None:
  o = attend(rule.__name__, rotated)
  for b, i, h in np.ndindex(B, L, H):
    expected = by_distance(plain, b, h, i, rule(i))
    np.testing.assert_allclose(o[b, i, h], expected, atol=2e-5)


@pytest.mark.parametrize("name", ["sliding_window", "streaming_llm", "lm_infinite"])
def test_windows_of_packed_documents(name: str, plain, rotated) -> None:
  """Each document gives what it gives alone, with RoPE counted from its own start."""
  ids = np.zeros((B, L), int)
  ids[0, 9:] = 1
  ids[1, :] = np.repeat([4, 7, -1], [11, 9, 3])
  packed = attend(name, rotated, segment_ids=jnp.asarray(ids))
  for row, start, end in [(0, 9, L), (1, 11, 20)]:
    document = [x[row : row + 1, start:end] for x in rotated]
    alone = attend(name, document)
    np.testing.assert_allclose(packed[row, start:end], alone[0], atol=2e-5)
  assert not packed[1, 20:].any()


def test_vertical_slash_mask(plain, rotated) -> None:
  q, k, v = (np.asarray(x, np.float64) for x in rotated)
  lengths = [23, 2, 17]
  o = attend("minference", rotated, lengths=jnp.array(lengths))
  for b, h in np.ndindex(B, H):
    n = lengths[b]
    by_key, by_gap = np.zeros(n), np.zeros(n)
    for i in range(max(0, n - 3), n):
      paid = softmax(k[b, : i + 1, h // R] @ q[b, i, h] / math.sqrt(D))
      for j in range(i + 1):
        by_key[j] += paid[j]
        by_gap[i - j] += paid[j]
    by_key[0] = by_gap[0] = by_gap[1:2] = np.inf
    keys, gaps = set(np.argsort(-by_key)[:4]), set(np.argsort(-by_gap)[:5])
    for i in range(n):
      seen = [j for j in range(i + 1) if j in keys or i - j in gaps]
      weights = softmax(k[b, seen, h // R] @ q[b, i, h] / math.sqrt(D))
      np.testing.assert_allclose(o[b, i, h], weights @ v[b, seen, h // R], atol=2e-5)
    assert not o[b, n:, h].any()


def evict(entries: list) -> list:
  """H2O: the two most recent entries stay, and of the others the three with most attention."""
  old, recent = entries[:-2], entries[-2:]
  heavy = sorted(range(len(old)), key=lambda s: -old[s][2])[:3]
  return [old[s] for s in sorted(heavy)] + recent


def merge(entries: list) -> list:
  """Links the most similar neighbours that are neither heavy nor recent, until 7 are left."""
  heaviest = max(range(len(entries) - 3), key=lambda s: entries[s][2])
  free = [s < len(entries) - 3 and s != heaviest for s in range(len(entries))]

  def cosine(s: int) -> float:
    a, b = entries[s - 1][0], entries[s][0]
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

  pairs = [s for s in range(1, len(entries)) if free[s] and free[s - 1]]
  linked = set(sorted(pairs, key=cosine, reverse=True)[: len(entries) - 7])
  runs: list[list] = []
  for s, entry in enumerate(entries):
    if s in linked:
      runs[-1].append(entry)
    else:
      runs.append([entry])
  return [merge_run(run) for run in runs]


def merge_run(run: list) -> list:
  keys, values, received = (np.array(x) for x in zip(*run, strict=True))
  squares = ((keys - keys[received.argmax()]) ** 2).sum(axis=1)
  weights = np.exp(-squares / (2 * squares.mean())) if len(run) > 1 else np.ones(1)
  weights /= weights.sum()
  return [weights @ keys, weights @ values, received.sum()]


@pytest.mark.parametrize(
  ("name", "reduce", "interval", "budget"),
  [("top_k_eviction", evict, 2, 5), ("kv_merger", merge, 3, 7)],
)
def test_bounded_caches_follow_their_rule(name, reduce, interval, budget, rotated) -> None:
  q, k, v = (np.asarray(x, np.float64) for x in rotated)
  o = attend(name, rotated)
  for b, n in np.ndindex(B, N):
    entries: list[list] = []  # of key, value, attention received
    for i in range(L):
      entries.append([k[b, i, n], v[b, i, n], 0.0])
      keys, values, _ = (np.array(x) for x in zip(*entries, strict=True))
      for h in range(n * R, (n + 1) * R):
        weights = softmax(keys @ q[b, i, h] / math.sqrt(D))
        np.testing.assert_allclose(o[b, i, h], weights @ values, atol=3e-5)
        for entry, weight in zip(entries, weights, strict=True):
          entry[2] += weight
      if (i + 1) % interval == 0 and len(entries) > budget:
        entries = reduce(entries)
        assert len(entries) == budget


def test_eviction_after_every_token_is_the_paper_s(rotated) -> None:
  """With interval 1 and the whole sequence in view, nothing is evicted and attention is dense."""
  wide = TopKEvictionConfig(heavy=L, recent=1, interval=1)
  config = dataclasses.replace(CONFIG, attention="top_k_eviction", top_k_eviction=wide)
  dense = attend("dense", rotated)
  o = make_attention(config).attend(*rotated, segment_ids=None, lengths=None)
  np.testing.assert_allclose(o, dense, atol=2e-5)


PROMPT, NEW = 13, 10
full = nnx.jit(Decoder.__call__)
prefill = nnx.jit(functools.partial(Decoder.prefill, max_length=PROMPT + NEW))
decode = nnx.jit(Decoder.decode)


def tokens_of(seed: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (B, PROMPT + NEW))


@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_equals_the_whole_sequence(name: str) -> None:
  model = random_decoder(dataclasses.replace(CONFIG, attention=name))
  tokens, lengths, rows = tokens_of(0), np.array([13, 2, 8]), np.arange(B)
  expected = full(model, tokens)
  logits, cache = prefill(model, tokens[:, :PROMPT], lengths)
  np.testing.assert_allclose(logits, expected[rows, lengths - 1], atol=3e-5)
  for step in range(NEW):
    logits, cache = decode(model, tokens[rows, lengths + step], cache)
    np.testing.assert_allclose(logits, expected[rows, lengths + step], atol=3e-5)
  cache, last = model.init_cache(B, 8), None
  for position in range(8):
    last, cache = decode(model, tokens[:, position], cache)
    np.testing.assert_allclose(last, expected[:, position], atol=3e-5)


def test_minference_decodes_densely() -> None:
  """Over a prompt so short that its mask hides nothing, it is dense attention throughout."""
  open_mask = MInferenceConfig(vertical=20, slash=20, first_tokens=1, recent_distances=1)
  model = random_decoder(dataclasses.replace(CONFIG, attention="minference", minference=open_mask))
  dense = random_decoder(dataclasses.replace(CONFIG, attention="dense"))
  tokens, lengths, rows = tokens_of(1), np.array([13, 2, 8]), np.arange(B)
  logits, cache = prefill(model, tokens[:, :PROMPT], lengths)
  expected = full(dense, tokens)
  np.testing.assert_allclose(logits, expected[rows, lengths - 1], atol=3e-5)
  logits, cache = decode(model, tokens[rows, lengths], cache)
  np.testing.assert_allclose(logits, expected[rows, lengths], atol=3e-5)


ENTRIES = {
  "sliding_window": 5,
  "streaming_llm": 7,
  "lm_infinite": 7,
  "top_k_eviction": 7,
  "kv_merger": 10,
  "minference": 40,
}


@pytest.mark.parametrize("name", KINDS)
def test_caches_hold_what_they_say(name: str) -> None:
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
    num_layers=24,
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
  # Room for a few layers' work, but not for a copy of all layers.
  assert memory.temp_size_in_bytes < size / 2


@pytest.mark.parametrize("name", KINDS)
def test_no_buffer_of_length_squared(name: str) -> None:
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
  whole = functools.partial(make_attention(small).attend, segment_ids=None, lengths=None)
  memory = jax.jit(whole).lower(x, x, x).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * length**2 / 2


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_finite_and_padding_is_not_read(name: str, rotated) -> None:
  lengths = jnp.array([23, 1, 12])
  token = np.arange(L)[None, :, None, None] < np.asarray(lengths)[:, None, None, None]

  def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return (kind_of(name).attend(q, k, v, segment_ids=None, lengths=lengths) ** 2).sum()

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*rotated)
  for gradient in gradients:
    assert np.isfinite(gradient).all()
    assert np.abs(np.where(token, gradient, 0)).max() > 0
    assert not np.where(token, 0, gradient).any()


@pytest.mark.parametrize("name", ["minference", "top_k_eviction", "kv_merger"])
def test_packed_documents_are_refused_where_they_make_no_sense(name: str, rotated) -> None:
  with pytest.raises(ValueError, match=f"segment_ids are given, but attention='{name}'"):
    attend(name, rotated, segment_ids=jnp.zeros((B, L), int))


@pytest.mark.parametrize("name", CAUSAL)
def test_mean_keys_counts_what_is_attended(name: str) -> None:
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
def test_budgets(name: str, keys: int) -> None:
  settings = type(getattr(CONFIG, name))().with_budget(keys)
  if name == "minference":
    assert settings.vertical + settings.slash == keys
    return
  config = dataclasses.replace(CONFIG, attention=name, **{name: settings})
  cache = make_attention(config).init_cache(1, 4096, 1, 8, jnp.float32)
  assert sum(x.shape[2] for x in jax.tree.leaves(cache) if x.ndim == 4) == 2 * keys


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: SlidingWindowConfig(0), r"SlidingWindowConfig\.window is 0.*at least 1"),
    (lambda: StreamingLLMConfig(sinks=-1), r"StreamingLLMConfig\.sinks is -1"),
    (lambda: LMInfiniteConfig(local_window=2.0), r"local_window is 2\.0"),
    (lambda: MInferenceConfig(vertical=10), r"first_tokens is 30.*at most vertical=10"),
    (lambda: TopKEvictionConfig(0, 0), r"heavy \+ recent is 0"),
    (lambda: KVMergerConfig(budget=100, heavy=30, recent=40), r"budget is 100.*at least .* 101"),
    (lambda: StreamingLLMConfig().with_budget(4), r"keys is 4.*at least 5"),
    (lambda: TopKEvictionConfig().with_budget(1), r"keys is 1.*at least 2"),
  ],
)
def test_settings_are_checked(make, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    make()
