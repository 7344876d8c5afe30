"""The baselines equal their papers' rules, computed token by token in NumPy, alone and decoding."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dga_jax.attention.segments import find_documents
from dga_jax.model.attention_kinds.minference import MInferenceConfig
from dga_jax.model.attention_kinds.top_k_eviction import TopKEvictionConfig
from tests.dga_jax.model.baseline_cases import (
  B,
  CAUSAL,
  CONFIG,
  D,
  decode,
  extend,
  full,
  H,
  kind_of,
  L,
  N,
  NEW,
  prefill,
  PROMPT,
  R,
  tokens_of,
)  # fmt: skip
from tests.dga_jax.model.random_decoder import random_decoder


def attend(name: str, qkv: tuple, **rows) -> np.ndarray:
  return np.asarray(jax.jit(kind_of(name))(*qkv, **rows))


def rotate(x_D: np.ndarray, positions: int) -> np.ndarray:
  """RoPE in complex numbers: channel c is the real part, channel c + D/2 the imaginary part."""
  half = len(x_D) // 2
  angle = positions * CONFIG.rope_base ** (-np.arange(half) / half)
  z = (x_D[:half] + 1j * x_D[half:]) * np.exp(1j * angle)
  return np.concatenate([z.real, z.imag])


@pytest.fixture(scope="module")
def plain() -> tuple[np.ndarray, ...]:
  """Random queries, keys and values before RoPE."""
  rng = np.random.default_rng(0)
  return tuple(rng.normal(size=(B, L, heads, D)) for heads in (H, N, N))


@pytest.fixture(scope="module")
def rotated(plain: tuple[np.ndarray, ...]) -> tuple[jax.Array, ...]:
  q, k, v = plain
  q, k = (
    np.stack([[[rotate(x, i) for x in row[i]] for i in range(L)] for row in rows])
    for rows in (q, k)
  )
  return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


def softmax(x: np.ndarray) -> np.ndarray:
  weights = np.exp(x - x.max())
  return weights / weights.sum()


def by_distance(
  plain: tuple[np.ndarray, ...], b: int, h: int, i: int, distances: dict
) -> np.ndarray:
  """Attention of query i to the keys of `distances`, with RoPE at the given distance of each."""
  q, k, v = plain
  keys = sorted(distances)
  logits = [rotate(q[b, i, h], distances[j]) @ k[b, j, h // R] / math.sqrt(D) for j in keys]
  return softmax(np.array(logits)) @ v[b, keys, h // R]


def sliding_window(i: int) -> dict[int, int]:
  return {j: i - j for j in range(i + 1) if i - j < 5}


def streaming_llm(i: int) -> dict[int, int]:
  cache = [j for j in range(i + 1) if j < 3 or i - j < 4]
  return {j: len(cache) - 1 - index for index, j in enumerate(cache)}


def lm_infinite(i: int) -> dict[int, int]:
  return {j: min(i - j, 4) for j in range(i + 1) if j < 3 or i - j < 4}


@pytest.mark.parametrize("rule", [sliding_window, streaming_llm, lm_infinite])
def test_window_kinds_follow_the_rules_of_their_papers(rule, plain, rotated) -> None:
  o = attend(rule.__name__, rotated)
  for b, i, h in np.ndindex(B, L, H):
    expected = by_distance(plain, b, h, i, rule(i))
    np.testing.assert_allclose(o[b, i, h], expected, atol=2e-5)


@pytest.mark.parametrize("name", ["sliding_window", "streaming_llm", "lm_infinite"])
def test_window_kinds_compute_packed_documents_separately(name: str, plain, rotated) -> None:
  """A packed document gives the output of the document alone, with RoPE from its first token."""
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
  """H2O: keeps the two most recent entries and the three others with the most attention."""
  old, recent = entries[:-2], entries[-2:]
  heavy = sorted(range(len(old)), key=lambda s: -old[s][2])[:3]
  return [old[s] for s in sorted(heavy)] + recent


def merge(entries: list) -> list:
  """KVMerger: merges the most similar neighbours, neither heavy nor recent, down to 7 entries."""
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
def test_budgeted_caches_follow_their_rule(name, reduce, interval, budget, rotated) -> None:
  q, k, v = (np.asarray(x, np.float64) for x in rotated)
  o = attend(name, rotated)
  for b, n in np.ndindex(B, N):
    entries: list[list] = []  # [key, value, accumulated attention] of each entry.
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


@pytest.mark.parametrize("name", ["top_k_eviction", "kv_merger"])
def test_a_dense_prompt_is_compressed_once(name: str, rotated) -> None:
  """All queries of the prompt score the keys. Only complete intervals are compressed."""
  reduce, interval = (evict, 2) if name == "top_k_eviction" else (merge, 3)
  settings = dataclasses.replace(getattr(CONFIG, name), dense_prompt=True)
  kind = dataclasses.replace(CONFIG, attention=name, **{name: settings}).make_attention()
  lengths = jnp.array([23, 4, 14])
  rows = kind.prepare(find_documents(B, L, lengths, None))
  o, cache = jax.jit(lambda *qkv: kind.prefill(*qkv, rows, max_length=30))(*rotated)
  np.testing.assert_allclose(o, attend("dense", rotated, lengths=lengths), atol=2e-5)
  q, k, v = (np.asarray(x, np.float64) for x in rotated)
  for b, n in np.ndindex(B, N):
    size = int(lengths[b])
    entries = [[k[b, i, n], v[b, i, n], 0.0] for i in range(size)]
    for i, h in itertools.product(range(size), range(n * R, (n + 1) * R)):
      for j, weight in enumerate(softmax(k[b, : i + 1, n] @ q[b, i, h] / math.sqrt(D))):
        entries[j][2] += weight
    whole = size // interval * interval
    kept = reduce(entries[:whole]) if whole > settings.entries else entries[:whole]
    kept += entries[whole:]
    for field, array in enumerate((cache.key, cache.value, cache.accumulated_attention)):
      expected = np.array([entry[field] for entry in kept])
      np.testing.assert_allclose(array[b, n, : len(kept)], expected, atol=3e-5)
  assert cache.key.shape[2] == settings.entries + interval


@pytest.mark.parametrize("name", ["top_k_eviction", "kv_merger"])
def test_decoding_after_a_dense_prompt(name: str) -> None:
  """Logits equal dense attention's before the first compression, and stay finite after it."""
  settings = dataclasses.replace(getattr(CONFIG, name), dense_prompt=True)
  config = dataclasses.replace(CONFIG, attention=name, **{name: settings})
  model, tokens, rows = random_decoder(config), tokens_of(0), np.arange(B)
  dense = full(random_decoder(dataclasses.replace(CONFIG, attention="dense")), tokens)
  lengths = np.array([13, 2, 8])
  logits, cache = prefill(model, tokens[:, :PROMPT], lengths)
  np.testing.assert_allclose(logits, dense[rows, lengths - 1], atol=3e-5)
  logits, cache = decode(model, tokens[rows, lengths], cache)
  np.testing.assert_allclose(logits[1], dense[1, 2], atol=3e-5)
  assert np.abs(logits[0] - dense[0, 13]).max() > 1e-3
  for step in range(1, NEW):
    logits, cache = decode(model, tokens[rows, lengths + step], cache)
  assert np.isfinite(logits).all()


def test_eviction_with_a_budget_of_all_tokens_is_dense_attention(rotated) -> None:
  """With interval 1 and a budget of all tokens, no token is evicted."""
  wide = TopKEvictionConfig(heavy=L, recent=1, interval=1)
  config = dataclasses.replace(CONFIG, attention="top_k_eviction", top_k_eviction=wide)
  dense = attend("dense", rotated)
  o = config.make_attention()(*rotated)
  np.testing.assert_allclose(o, dense, atol=2e-5)


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
  """After a prompt that is too short for its mask to hide keys, logits equal dense attention's."""
  open_mask = MInferenceConfig(vertical=20, slash=20, first_tokens=1, recent_distances=1)
  model = random_decoder(dataclasses.replace(CONFIG, attention="minference", minference=open_mask))
  dense = random_decoder(dataclasses.replace(CONFIG, attention="dense"))
  tokens, lengths, rows = tokens_of(1), np.array([13, 2, 8]), np.arange(B)
  logits, cache = prefill(model, tokens[:, :PROMPT], lengths)
  expected = full(dense, tokens)
  np.testing.assert_allclose(logits, expected[rows, lengths - 1], atol=3e-5)
  logits, cache = decode(model, tokens[rows, lengths], cache)
  np.testing.assert_allclose(logits, expected[rows, lengths], atol=3e-5)


@pytest.mark.parametrize("name", ["sliding_window", "streaming_llm", "lm_infinite"])
def test_chunks_equal_the_whole_sequence(name: str) -> None:
  """Chunks shorter and longer than the window, before and after the sinks are full."""
  model = random_decoder(dataclasses.replace(CONFIG, attention=name))
  tokens, row = tokens_of(3), np.arange(B)
  want, position = full(model, tokens), np.array([13, 1, 8])
  _, cache = prefill(model, tokens[:, :PROMPT], position)
  for counts in ([6, 1, 4], [2, 6, 5]):
    chunk = tokens[row[:, None], np.minimum(position[:, None] + np.arange(6), PROMPT + NEW - 1)]
    logits, cache = extend(model, chunk, cache, np.array(counts))
    position = position + counts
    np.testing.assert_allclose(logits, want[row, position - 1], atol=3e-5)
  logits, cache = decode(model, tokens[row, position], cache)
  np.testing.assert_allclose(logits, want[row, position], atol=3e-5)
