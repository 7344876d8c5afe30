"""Full heads and sink windows whose caches store tokens in 8 bits."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dga_jax import DGAConfig, HeadBudgets, SinkWindow
from dga_jax.attention.segments import find_documents
from dga_jax.head_budgets import HeadSetting
from dga_jax.model import apply_budgets, Decoder, ModelConfig
from dga_jax.model.attention_kinds.head_budgets import kind_of_setting
from tests.dga_jax.model.random_decoder import random_decoder

B, L, N, R, D, LAYER = 2, 24, 2, 3, 16, 1
SETTINGS: dict[str, HeadSetting] = {
  "full": "full",
  "sinks": SinkWindow(window=7, sinks=3),
  "window": SinkWindow(window=6, sinks=0),
}
DTYPES = {"int8": jnp.int8, "float8_e4m3fn": jnp.float8_e4m3fn}
LARGEST = {"int8": 127, "float8_e4m3fn": 448}
every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


@functools.cache
def tokens() -> tuple[jax.Array, jax.Array, jax.Array]:
  """Random queries, keys and values of a sequence; the sizes of keys differ by 2⁶."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(B, L, heads, D)) for heads in (N * R, N, N))
  k *= 2.0 ** rng.integers(-3, 3, (B, L, N, 1))
  return jnp.float32(q), jnp.float32(k), jnp.float32(v)


def rounded(rows: jax.Array, dtype: str) -> np.ndarray:
  """Each row as its cache returns it: the largest element maps to the largest number."""
  rows = np.asarray(rows, np.float32)
  scale = np.abs(rows).max(axis=-1, keepdims=True) / LARGEST[dtype]
  numbers = np.floor(rows / scale + 0.5) if dtype == "int8" else rows / scale
  return numbers.astype(DTYPES[dtype]).astype(np.float32) * scale


def expected(setting: HeadSetting, dtype: str) -> np.ndarray:
  """Attention of every token to the rounded tokens that it sees under a setting, with itself."""
  q, k, v = tokens()
  k, v = (np.repeat(rounded(x, dtype), R, axis=2).astype(np.float64) for x in (k, v))
  logits = np.einsum("bihd,bjhd->bhij", np.asarray(q, np.float64), k) / np.sqrt(D)
  i, j = np.arange(L)[:, None], np.arange(L)[None]
  seen = j <= i
  if isinstance(setting, SinkWindow):
    seen &= (j < setting.sinks) | (j > i - setting.window)
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True)) * seen
  return np.einsum("bhij,bjhd->bihd", weights / weights.sum(axis=-1, keepdims=True), v)


def empty(kind):
  caches = kind.init_caches(2, B, L, N, D, jnp.float32)

  def with_bad_layer(x):
    """Nothing is read of the other layer."""
    has_nan = jnp.issubdtype(x.dtype, jnp.floating)
    return x.at[1 - LAYER].set(jnp.nan) if has_nan else x

  return jax.tree.map(with_bad_layer, caches)


def decode(kind, cache, start: int, end: int):
  """Outputs [B, T, H, D] of the tokens, decoded one by one, and the cache."""

  @jax.jit
  def step(cache, token):
    out, cache = kind.decode(*token, cache, jnp.int32(LAYER))
    return cache, out

  token = tuple(jnp.moveaxis(x[:, start:end], 1, 0) for x in tokens())
  cache, out = jax.lax.scan(step, cache, token)
  return jnp.moveaxis(out, 0, 1), cache


@every_setting
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_tokens_read_rounded_tokens(setting: HeadSetting, dtype: str):
  kind = kind_of_setting(setting, dtype)
  out, cache = decode(kind, empty(kind), 0, L)
  np.testing.assert_allclose(out, expected(setting, dtype), rtol=1e-4, atol=1e-5)
  stored = [x for x in jax.tree.leaves(cache) if x.ndim == 5 and x.size]
  assert {x.dtype for x in stored} == {jnp.dtype(dtype)}
  plain = kind_of_setting(setting)
  exact, _ = decode(plain, empty(plain), 0, L)
  error = np.linalg.norm(out - exact) / np.linalg.norm(exact)
  assert 1e-3 < error < {"int8": 0.02, "float8_e4m3fn": 0.06}[dtype]


@every_setting
def test_chunks_of_unequal_rows_equal_decoding(setting: HeadSetting):
  kind, want = kind_of_setting(setting, "int8"), expected(setting, "int8")
  cache, position = empty(kind), np.zeros(B, int)
  extend = jax.jit(kind.extend)
  for counts in ((9, 2), (1, 11), (0, 1), (10, 10)):
    index = np.minimum(position[:, None] + np.arange(11), L - 1)
    chunk = (jnp.take_along_axis(x, index[:, :, None, None], axis=1) for x in tokens())
    out, cache = extend(*chunk, cache, jnp.int32(LAYER), lengths=jnp.array(counts))
    for b, count in enumerate(counts):
      got, place = out[b, :count], slice(position[b], position[b] + count)
      np.testing.assert_allclose(got, want[b, place], rtol=1e-4, atol=1e-5)
    position += counts
  _, decoded = decode(kind, empty(kind), 0, 20)
  rows = [np.asarray(x)[LAYER, 0] for x in jax.tree.leaves(cache)]
  for got, other in zip(rows, jax.tree.leaves(decoded), strict=True):
    np.testing.assert_array_equal(got, np.asarray(other)[LAYER, 0])


@every_setting
def test_a_prompt_reads_exact_tokens_and_leaves_the_cache_of_decoding(setting: HeadSetting):
  kind, plain = kind_of_setting(setting, "int8"), kind_of_setting(setting)
  length_B, P = jnp.array([11, 2]), 12
  prompt = [x[:, :P] for x in tokens()]
  metadata = kind.prepare(find_documents(B, P, length_B, None))
  out, cache = kind.prefill(*prompt, metadata, max_length=L)
  np.testing.assert_array_equal(out, plain.attend(*prompt, metadata))
  stacked = jax.tree.map(lambda one, all_layers: all_layers.at[LAYER].set(one), cache, empty(kind))
  index = jnp.array([[11, 2], [12, 3]])[..., None, None]
  token = (jnp.take_along_axis(x, index.swapaxes(0, 1), axis=1) for x in tokens())
  got, after = kind.extend(*token, stacked, jnp.int32(LAYER), lengths=jnp.array([2, 2]))
  want = expected(setting, "int8")
  for b, start in enumerate((11, 2)):
    np.testing.assert_allclose(got[b], want[b, start : start + 2], rtol=1e-4, atol=1e-5)
  _, decoded = decode(kind, empty(kind), 0, 13)
  for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(decoded), strict=True):
    row, wanted = np.asarray(one)[LAYER, 0], np.asarray(other)[LAYER, 0]
    if setting == "full" and row.ndim:  # The padding of a prompt is stored and never read.
      row, wanted = row[:, :13], wanted[:, :13]
    np.testing.assert_array_equal(row, wanted)


BLOCKS = DGAConfig(selection="streaming", group_size=3, sink_tokens=1)
BUDGETS = HeadBudgets(("full", BLOCKS, SETTINGS["sinks"]), ((1, 0, 2), (2, 2, 0)), "int8")
CONFIG = ModelConfig(
  vocab_size=31,
  num_layers=2,
  embed_dim=16,
  num_heads=6,
  num_kv_heads=3,
  head_dim=8,
  mlp_dim=24,
  attention="dense",
  dtype="float32",
)


def test_a_model_decodes_as_it_extends_and_differs_from_plain_storage_by_rounding():
  dense = random_decoder(CONFIG)
  ids = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (B, 20), dtype=np.int32)
  prefill = nnx.jit(functools.partial(Decoder.prefill, max_length=20))
  decode, extend = nnx.jit(Decoder.decode), nnx.jit(Decoder.extend)

  def decoded(budgets: HeadBudgets) -> np.ndarray:
    model = apply_budgets(dense, budgets)
    logits, cache = prefill(model, ids[:, :9])
    for position in range(9, 20):
      logits, cache = decode(model, ids[:, position], cache)
    return logits

  model = apply_budgets(dense, BUDGETS)
  chunk, _ = extend(model, ids[:, 9:], prefill(model, ids[:, :9])[1], np.array([11, 11]))
  got, plain = decoded(BUDGETS), decoded(dataclasses.replace(BUDGETS, cache_dtype=None))
  np.testing.assert_allclose(got, chunk, atol=3e-5)
  assert 1e-3 < np.linalg.norm(got - plain) / np.linalg.norm(plain) < 0.1


def test_budgets_keep_the_dtype_of_their_caches():
  permuted = BUDGETS.arranged()
  assert permuted != BUDGETS
  assert permuted.cache_dtype == BUDGETS.layer(1).cache_dtype == "int8"
  assert apply_budgets(random_decoder(CONFIG), BUDGETS).config.head_budgets == permuted
  assert HeadBudgets.from_dict(json.loads(BUDGETS.to_json())) == BUDGETS
  config = dataclasses.replace(CONFIG, attention="head_budgets", head_budgets=BUDGETS)
  assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
  plain = dataclasses.replace(BUDGETS, cache_dtype=None)
  assert plain.to_dict().keys() == {"settings", "assignment"}  # As files before `cache_dtype`.
  assert HeadBudgets.from_dict(plain.to_dict()) == plain


def test_one_dtype_for_all_heads_merges_settings_that_become_equal():
  packed = dataclasses.replace(BLOCKS, cache_dtype="float8_e4m3fn")
  budgets = HeadBudgets((BLOCKS, "full", packed), ((0, 1, 2), (2, 2, 1)))
  assert budgets.with_cache_dtype("float8_e4m3fn") == HeadBudgets(
    (packed, "full"), ((0, 1, 0), (0, 0, 1)), "float8_e4m3fn"
  )


@pytest.mark.invalid_arguments
def test_other_dtypes_are_refused():
  with pytest.raises(ValueError, match=r"HeadBudgets\.cache_dtype is 'int4'.*'int8', 'float8_e4m"):
    dataclasses.replace(BUDGETS, cache_dtype="int4")
  with pytest.raises(ValueError, match="optionally 'cache_dtype'"):
    HeadBudgets.from_dict(BUDGETS.to_dict() | {"dtype": "int8"})
