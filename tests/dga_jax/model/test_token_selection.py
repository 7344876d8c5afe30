"""Each method that selects tokens follows the rule of its paper, computed in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dga_jax.attention.segments import find_documents
from dga_jax.evaluation.variants import Family, Variant
from dga_jax.model.attention_kinds.clusterkv import ClusterKVConfig
from dga_jax.model.attention_kinds.expected_attention import ExpectedAttentionConfig
from dga_jax.model.attention_kinds.pqcache import PQCacheConfig
from dga_jax.model.attention_kinds.quest import QuestConfig
from dga_jax.model.attention_kinds.snapkv import SnapKVConfig
from dga_jax.model.attention_kinds.token_selection import HeadShape
from tests.dga_jax.model.baseline_cases import CONFIG, decode, full, prefill, tokens_of
from tests.dga_jax.model.random_decoder import random_decoder

B, L, N, R, D, NEW = 3, 23, 2, 2, 8, 4
LENGTHS = (23, 15, 3)
SETTINGS = {
  "snapkv": SnapKVConfig(capacity=9, window=4, kernel=3),
  "quest": QuestConfig(budget=10, page_size=4, dense_layers=1),
  "expected_attention": ExpectedAttentionConfig(
    capacity=8, sinks=2, future_positions=5, epsilon=0.02
  ),
  "clusterkv": ClusterKVConfig(
    budget=9, sinks=2, tokens_per_cluster=5, iterations=3, dense_layers=1
  ),
  "pqcache": PQCacheConfig(top_k=4, recent=3, sinks=2, parts=2, bits=2, iterations=3),
}


def kind_of(name: str):
  config = dataclasses.replace(CONFIG, attention=name, **{name: SETTINGS[name]})
  return config.make_attention()


@pytest.fixture(scope="module")
def qkv() -> tuple[np.ndarray, ...]:
  rng = np.random.default_rng(0)
  return tuple(rng.normal(size=(B, L + NEW, heads, D)) for heads in (N * R, N, N))


def softmax(x: np.ndarray) -> np.ndarray:
  weights = np.exp(x - x.max())
  return weights / weights.sum()


def highest(scores: dict[int, float], count: int) -> set[int]:
  return set(sorted(scores, key=lambda j: (-scores[j], j))[: max(count, 0)])


def snapkv(q: np.ndarray, k: np.ndarray, v: np.ndarray, length: int) -> set[int]:
  """Tokens of the prompt that stay; q is [R, tokens, D] of one KV head."""
  votes = np.zeros(length)
  for i in range(max(0, length - 4), length):
    for head in q:
      votes[: i + 1] += softmax(k[: i + 1] @ head[i] / D**0.5)
  prefix = max(0, length - 4)
  pooled = {j: votes[max(0, j - 1) : min(prefix, j + 2)].max() for j in range(prefix)}
  return highest(pooled, 9 - 4) | set(range(prefix, length))


def rotation(position: int) -> np.ndarray:
  """The matrix of RoPE at a position."""
  matrix, half = np.zeros((D, D)), D // 2
  for c in range(half):
    angle = position * CONFIG.rope_base ** (-c / half)
    matrix[c, c] = matrix[c + half, c + half] = np.cos(angle)
    matrix[c, c + half], matrix[c + half, c] = -np.sin(angle), np.sin(angle)
  return matrix


def expected_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, length: int) -> set[int]:
  sinks, others = set(range(min(2, length))), range(2, length)
  mean_rotation = np.mean([rotation(length + t) for t in range(5)], axis=0)
  weights = np.zeros(length)
  for head in q:
    plain = np.array([rotation(i).T @ head[i] for i in others])
    mu = mean_rotation @ plain.mean(axis=0)
    sigma = mean_rotation @ np.cov(plain.T, bias=True) @ mean_rotation.T
    z = {j: np.exp(k[j] @ mu / D**0.5 + k[j] @ sigma @ k[j] / (2 * D)) for j in others}
    for j in others:
      weights[j] += z[j] / sum(z.values()) / len(q)
  scores = {j: (weights[j] + 0.02) * np.linalg.norm(v[j]) for j in others}
  return highest(scores, 8 - 2) | sinks


def quest(query: np.ndarray, k: np.ndarray, position: int) -> set[int]:
  """Tokens that a query at a position reads."""
  pages = [range(p, min(p + 4, position + 1)) for p in range(0, position + 1, 4)]
  bounds = {}
  for index, page in enumerate(pages):
    low, high = k[list(page)].min(axis=0), k[list(page)].max(axis=0)
    bounds[index] = sum(max(a, b) for a, b in zip(query * low, query * high, strict=True))
  return {j for index in highest(bounds, 10 // 4) for j in pages[index]}


def k_means(x: np.ndarray, clusters: int, closeness) -> tuple[np.ndarray, np.ndarray]:
  """Centroids after three rounds, and the nearest one of each point."""
  centroids = x[[j * len(x) // clusters for j in range(clusters)]]
  for _ in range(3):
    nearest = np.array([np.argmax([closeness(p, c) for c in centroids]) for p in x])
    centroids = np.array(
      [
        x[nearest == c].mean(axis=0) if (nearest == c).any() else old
        for c, old in enumerate(centroids)
      ]
    )
  return centroids, np.array([np.argmax([closeness(p, c) for c in centroids]) for p in x])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
  return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def clusterkv(query: np.ndarray, k: np.ndarray, length: int) -> set[int]:
  """Tokens of the prompt that a query reads."""
  if length <= 2:
    return set(range(length))
  centroids, nearest = k_means(k[2:length], max(1, length // 5), cosine)
  order = sorted(range(len(centroids)), key=lambda c: -(query @ centroids[c]))
  tokens = [2 + j for c in order for j in np.flatnonzero(nearest == c)]
  return {0, 1, *tokens[: 9 - 2]}


def pqcache(heads: np.ndarray, k: np.ndarray, length: int, position: int) -> set[int]:
  """Tokens that the queries at a position read."""
  if length - 2 <= 4:
    return set(range(position + 1))
  estimates, candidates = np.zeros((R, position + 1)), range(2, position - 3)
  for part in (slice(0, D // 2), slice(D // 2, D)):
    centroids, _ = k_means(k[2:length, part], 4, lambda a, b: -((a - b) ** 2).sum())
    for j in candidates:
      code = np.argmin(((k[j, part] - centroids) ** 2).sum(axis=1))
      estimates[:, j] += heads[:, position, part] @ centroids[code]
  weights = sum(softmax(estimates[r, list(candidates)] / D**0.5) for r in range(R))
  chosen = highest(dict(zip(candidates, weights, strict=True)), 4)
  return {0, 1} | chosen | set(range(position - 3, position + 1))


def tokens_read(name: str, heads, r: int, k, v, length: int, position: int) -> set[int]:
  """Tokens that query head r of a KV head reads at a position."""
  new = set(range(length, position + 1))
  match name:
    case "snapkv":
      return snapkv(heads, k, v, length) | new
    case "expected_attention":
      return expected_attention(heads, k, v, length) | new
    case "quest":
      return quest(heads[r, position], k, position)
    case "clusterkv":
      return clusterkv(heads[r, position], k, length) | new
  return pqcache(heads, k, length, position)


def steps(name: str, qkv: tuple[np.ndarray, ...], layer: int):
  """Outputs of the prompt, and of each decoding step."""
  kind = kind_of(name)
  q, k, v = (jnp.asarray(x, jnp.float32) for x in qkv)
  lengths, rows = jnp.array(LENGTHS), np.arange(B)
  documents = kind.prepare(find_documents(B, L, lengths, None))
  prompt, cache = jax.jit(lambda *x: kind.prefill(*x, documents, max_length=L + NEW))(
    *(x[:, :L] for x in (q, k, v))
  )
  cache = jax.tree.map(lambda x: jnp.stack([jnp.zeros_like(x)] * layer + [x]), cache)
  step = jax.jit(kind.decode)
  outs = []
  for t in range(NEW):
    at = lengths + t
    out, cache = step(q[rows, at], k[rows, at], v[rows, at], cache, jnp.int32(layer))
    outs.append(out)
  return prompt, np.stack(outs, axis=1)


@pytest.mark.parametrize("name", SETTINGS)
def test_decoding_reads_the_tokens_of_the_papers_rule(name, qkv) -> None:
  prompt, outs = steps(name, qkv, layer=1)
  q, k, v = qkv
  smaller = 0
  for b, n in np.ndindex(B, N):
    length, own_k, own_v = LENGTHS[b], k[b, :, n], v[b, :, n]
    heads = q[b, :, n * R : (n + 1) * R].swapaxes(0, 1)
    for r in range(R):
      for i in range(length):
        weights = softmax(own_k[: i + 1] @ heads[r, i] / D**0.5)
        np.testing.assert_allclose(prompt[b, i, n * R + r], weights @ own_v[: i + 1], atol=2e-5)
    for t in range(NEW):
      position = length + t
      for r in range(R):
        query = heads[r, position]
        seen = tokens_read(name, heads, r, own_k, own_v, length, position)
        smaller += len(seen) < position + 1
        index = sorted(seen)
        weights = softmax(own_k[index] @ query / D**0.5)
        np.testing.assert_allclose(outs[b, t, n * R + r], weights @ own_v[index], atol=3e-5)
  assert smaller > B * N * NEW // 2


@pytest.mark.parametrize("name", ["quest", "clusterkv"])
def test_all_tokens_are_read_in_the_first_layers(name: str, qkv) -> None:
  _, outs = steps(name, qkv, layer=0)
  q, k, v = qkv
  for b, n, t in np.ndindex(B, N, NEW):
    seen = LENGTHS[b] + t + 1
    weights = softmax(k[b, :seen, n] @ q[b, seen - 1, n * R] / D**0.5)
    np.testing.assert_allclose(outs[b, t, n * R], weights @ v[b, :seen, n], atol=2e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_budget_of_all_tokens_is_dense_attention(name: str) -> None:
  settings = type(SETTINGS[name])().with_budget(96)
  model = random_decoder(dataclasses.replace(CONFIG, attention=name, **{name: settings}))
  dense = random_decoder(dataclasses.replace(CONFIG, attention="dense"))
  tokens, lengths, rows = tokens_of(0), np.array([13, 4, 9]), np.arange(3)
  want = full(dense, tokens)
  logits, cache = prefill(model, tokens[:, :13], lengths)
  np.testing.assert_allclose(logits, want[rows, lengths - 1], atol=2e-4)
  for step in range(3):
    logits, cache = decode(model, tokens[rows, lengths + step], cache)
    np.testing.assert_allclose(logits, want[rows, lengths + step], atol=2e-4)


def test_stored_and_read_memory_are_told_apart() -> None:
  family = Family(random_decoder(dataclasses.replace(CONFIG, attention="dense")))
  length, entry = 320, 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 4
  budgets = {
    name: family.budget(Variant(name, {"attention": name}, 0.25), length)
    for name in (*SETTINGS, "streaming_llm")
  }
  for name in ("snapkv", "expected_attention", "streaming_llm"):
    assert budgets[name].share == budgets[name].read_share == 0.25
    assert budgets[name].bytes == CONFIG.num_layers * 80 * entry
  # The first two layers of Quest and ClusterKV are dense, and this model has no others.
  for name in ("quest", "clusterkv"):
    assert budgets[name].share == budgets[name].read_share == 1
  # 288 codes of 2 times 6 bits, and 64 keys without values; a key and its value have 512 bits.
  codes, centroids = 288 * 12 / 512, 64 / 2
  assert budgets["pqcache"].read_share == pytest.approx((80 + codes + centroids) / 320)
  assert budgets["pqcache"].share == pytest.approx((320 + codes + centroids) / 320)
  shape, layer = HeadShape(query_heads=2, head_dim=8, bits=32), 2
  memory = {
    name: dataclasses.replace(CONFIG, attention=name, **{name: settings})
    .make_attention()
    .prompt_memory(length, layer, shape)
    for name, settings in {"quest": QuestConfig(80), "clusterkv": ClusterKVConfig(80)}.items()
  }
  assert memory["quest"] == (320 + 20, 20 + 2 * 80)
  assert memory["clusterkv"] == (320 + 4 / 2 + 320 * 32 / 512, 4 / 2 + 16 + 2 * 64)


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_of_decoding_are_not_those_of_whole_sequences(name: str) -> None:
  family = Family(random_decoder(dataclasses.replace(CONFIG, attention="dense")))
  assert not family.decodes_as_whole(Variant(name, {"attention": name}), 64)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: SnapKVConfig(capacity=16), r"capacity is 16; it must be at least window=32"),
    (lambda: SnapKVConfig(kernel=4), r"kernel is 4; it must be odd"),
    (lambda: QuestConfig(budget=15), r"budget is 15; it must be at least page_size=16"),
    (lambda: ExpectedAttentionConfig(epsilon=-1.0), r"epsilon is -1\.0"),
    (lambda: ExpectedAttentionConfig(capacity=3), r"capacity is 3; it must be at least"),
    (lambda: ClusterKVConfig(budget=16), r"budget is 16; it must be greater than sinks=16"),
    (lambda: PQCacheConfig().with_budget(33), r"keys is 33.*at least 34"),
    (lambda: SnapKVConfig().with_budget(20), r"keys is 20.*at least 32"),
  ],
)
def test_invalid_settings_are_errors(make, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    make()
