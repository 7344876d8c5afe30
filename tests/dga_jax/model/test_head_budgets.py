"""The decoder with a setting for each KV head: order of heads, caches, layers, meshes, JSON."""

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dga_jax import DGAConfig, HeadBudgets, SinkWindow
from dga_jax.cache import cache_size
from dga_jax.model import apply_budgets, Decoder, ModelConfig
from dga_jax.model.attention_kinds.dense import DenseAttention
from dga_jax.model.attention_kinds.head_class import attend_class
from tests.dga_jax.model.random_decoder import abstract_decoder, random_decoder

BLOCKS = DGAConfig(selection="streaming", group_size=3, selector="fitted")
WINDOW = DGAConfig(
  selection="streaming", group_size=2, focal_per_block=1, sink_tokens=2, local_window=1
)
SINKS = SinkWindow(4, sinks=2)
BUDGETS = HeadBudgets(("full", WINDOW, BLOCKS, SINKS), ((1, 0, 3), (0, 0, 1), (2, 1, 0)))
CONFIG = ModelConfig(
  vocab_size=31,
  num_layers=3,
  embed_dim=16,
  num_heads=6,
  num_kv_heads=3,
  head_dim=8,
  mlp_dim=24,
  attention="dense",
  dtype="float32",
  qkv_bias=True,
  qk_norm=True,
  focal_selector=True,
)
DENSE = random_decoder(CONFIG)
MODEL = apply_budgets(DENSE, BUDGETS)
MODELS = {"stacked": MODEL, "unstacked": MODEL.unstack_layers()}
B, PROMPT, NEW = 3, 9, 8
TOTAL = PROMPT + NEW
forward = nnx.jit(Decoder.__call__)
prefill = nnx.jit(functools.partial(Decoder.prefill, max_length=TOTAL))
decode = nnx.jit(Decoder.decode)
extend = nnx.jit(Decoder.extend)


def tokens_of(seed):
  return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (B, TOTAL), dtype=np.int32)


def with_config(model, **changes):
  """The same weights under another config."""
  config = dataclasses.replace(model.config, **changes)
  return nnx.merge(nnx.graphdef(abstract_decoder(config)), nnx.state(model))


def test_the_order_of_heads_changes_no_function():
  tokens = tokens_of(0)
  assert MODEL.config.head_budgets.assignment == ((0, 1, 3), (0, 0, 1), (0, 1, 2))
  as_dense = with_config(MODEL, attention="dense")
  np.testing.assert_allclose(forward(as_dense, tokens), forward(DENSE, tokens), atol=2e-5)
  as_given = with_config(DENSE, attention="head_budgets", head_budgets=BUDGETS)
  got, want = forward(MODEL, tokens), forward(as_given, tokens)
  np.testing.assert_allclose(got, want, atol=2e-5)
  assert np.abs(got - forward(DENSE, tokens)).max() > 1e-2
  in_two_parts = apply_budgets(
    random_decoder(dataclasses.replace(CONFIG, num_heads=4, num_kv_heads=4)),
    HeadBudgets(("full", BLOCKS), ((0, 0, 1, 1),) * 3),
    parts=2,
  )
  assert in_two_parts.config.head_budgets.assignment == ((0, 1, 0, 1),) * 3


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=4)
@given(st.lists(st.integers(1, PROMPT), min_size=B, max_size=B), st.integers(0, 2**16))
def test_prefill_chunks_and_decoding_equal_the_whole_sequence(name, lengths, seed):
  model, tokens, row = MODELS[name], tokens_of(seed), np.arange(B)
  want, position = forward(MODEL, tokens), np.array(lengths)
  logits, cache = prefill(model, tokens[:, :PROMPT], position)
  np.testing.assert_allclose(logits, want[row, position - 1], atol=3e-5)
  for _ in range(2):
    logits, cache = decode(model, tokens[row, position], cache)
    np.testing.assert_allclose(logits, want[row, position], atol=3e-5)
    position = position + 1
  counts = np.array([5, 1, 3])
  chunk = tokens[row[:, None], np.minimum(position[:, None] + np.arange(5), TOTAL - 1)]
  logits, cache = extend(model, chunk, cache, counts)
  position = position + counts
  np.testing.assert_allclose(logits, want[row, position - 1], atol=3e-5)
  logits, cache = decode(model, tokens[row, position], cache)
  np.testing.assert_allclose(logits, want[row, position], atol=3e-5)
  np.testing.assert_array_equal(cache.length, position + 1)


def test_repeated_tokens_of_a_block_tie_in_every_path():
  """Rounding errors of equal tokens' scores differ between prefill and decoding."""
  model = apply_budgets(DENSE, HeadBudgets((BLOCKS,), ((0,) * CONFIG.num_kv_heads,) * 3))
  tokens = tokens_of(65536)
  assert tokens[2, :4].tolist() == [13, 13, 30, 30]
  want = forward(model, tokens)
  _, cache = prefill(model, tokens[:, :PROMPT], np.full(B, 2))
  for position in (2, 3):
    _, cache = decode(model, tokens[:, position], cache)
  logits, _ = extend(model, tokens[:, 4:9], cache, np.full(B, 5))
  np.testing.assert_allclose(logits, want[:, 8], atol=3e-5)


def bytes_of(cache):
  floats = (x for x in jax.tree.leaves(cache.layers) if x.dtype != jnp.int32)
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in floats)


def test_the_cache_holds_the_sum_of_the_heads():
  packed = dataclasses.replace(WINDOW, cache_dtype="int8")
  budgets = dataclasses.replace(BUDGETS, settings=("full", packed, BLOCKS, SINKS))
  model = with_config(MODEL, head_budgets=budgets.permute_kv_heads(BUDGETS.contiguous_order()))
  D, length = CONFIG.head_dim, 100
  dense, blocks = length * D * 4, cache_size(config=BLOCKS, max_length=length).total * D * 4
  scores = BLOCKS.block_size * 4
  size = cache_size(config=packed, max_length=length)
  # 8-bit entries have a float32 scale each; raw tokens keep the dtype of the model.
  window = size.compact * (D + 4) + size.raw * D * 4
  sinks = (4 + 2) * D * 4
  want = B * (2 * (4 * dense + 3 * window + blocks + sinks) + scores)
  cache = jax.eval_shape(lambda: model.init_cache(B, length))
  assert bytes_of(cache) == want
  prompts = jax.eval_shape(lambda: model.prefill(tokens_of(0), max_length=length)[1])
  assert jax.tree.map(jnp.shape, prompts) == jax.tree.map(jnp.shape, cache)


def test_entries_of_8_bits_round():
  packed = (dataclasses.replace(setting, cache_dtype="int8") for setting in (WINDOW, BLOCKS))
  budgets = dataclasses.replace(BUDGETS, settings=("full", *packed, SINKS))
  model = apply_budgets(DENSE, budgets).unstack_layers()
  tokens = tokens_of(1)
  _, cache = prefill(model, tokens[:, :PROMPT])
  logits, _ = decode(model, tokens[:, PROMPT], cache)
  error = np.abs(logits - forward(MODEL, tokens)[:, PROMPT])
  assert 0 < error.max() < 0.05


@pytest.mark.parametrize("name", MODELS)
def test_decoding_updates_the_cache_in_place(name):
  config = dataclasses.replace(
    MODEL.config,
    num_layers=8,
    head_budgets=HeadBudgets(BUDGETS.settings, ((0, 0, 1), (0, 1, 3), (2, 2, 2), (0, 0, 1)) * 2),
  )
  model = random_decoder(config)
  model = model.unstack_layers() if name == "unstacked" else model
  cache = jax.eval_shape(lambda: model.init_cache(B, 2048))
  donated = jax.jit(lambda c: model.decode(jnp.zeros(B, int), c)[1], donate_argnums=0)
  memory = donated.lower(cache).compile().memory_analysis()
  assert memory.alias_size_in_bytes >= bytes_of(cache)
  # Room for a layer or two, but not for all eight.
  assert memory.temp_size_in_bytes < bytes_of(cache) / 3


def test_a_layer_scan_switches_between_rows():
  """Values and gradients are those of layers one by one, for packed rows."""
  tokens = tokens_of(2)
  ids = np.array([[0] * 5 + [1] * 12, [0] * 17, [0] * 9 + [1] * 5 + [-1] * 3])
  weights = np.random.default_rng(0).normal(size=(B, TOTAL, CONFIG.embed_dim)).astype(np.float32)

  def run(model):
    structure, params = nnx.split(model)

    def loss(params):
      return (nnx.merge(structure, params).hidden(tokens, segment_ids=ids) * weights).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    return value, gradient["embedding"][...]

  for ours, theirs in zip(run(MODEL), run(MODELS["unstacked"]), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
  program = str(jax.make_jaxpr(lambda: MODEL.hidden(tokens))())
  assert program.count("= cond[") == 1, "one switch in the scan"


@pytest.mark.parametrize("call", ["hidden", "prefill"])
def test_rows_share_the_programs_of_equal_classes(call):
  """8 classes in three rows, of which a full head and a head with WINDOW are in several rows."""
  options = {"max_length": TOTAL} if call == "prefill" else {}
  function = functools.partial(getattr(Decoder, call), **options)
  text = nnx.jit(function).lower(MODEL, tokens_of(0)).as_text()
  name = {"hidden": "attend_class", "prefill": "prefill_class"}[call]
  assert len(re.findall(rf"call @{name}\w*\(", text)) == 8
  assert len(re.findall(rf"func\.func private @{name}\w*\(", text)) == 5


def test_concrete_arrays_keep_their_device():
  """The choice of kernels reads the device of a concrete array, which a trace would hide."""
  seen = []

  class Kind(DenseAttention):
    def attend(self, q, k, v, metadata):
      seen.append(isinstance(q, jax.core.Tracer))
      return q

  x = jnp.zeros((1, 4, 1, 8))
  attend_class(Kind(), None, x, x, x)
  jax.jit(functools.partial(attend_class, Kind(), None))(x, x, x)
  assert seen == [False, True]


def test_heads_of_equal_layers_need_no_switch():
  budgets = HeadBudgets(("full", BLOCKS), ((0, 1, 1),) * 3)
  model = with_config(DENSE, attention="head_budgets", head_budgets=budgets)
  assert "cond[" not in str(jax.make_jaxpr(lambda: model.hidden(tokens_of(0)))())


def test_budgets_pass_through_json():
  config = MODEL.config
  assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
  assert ModelConfig.from_dict(CONFIG.to_dict()).head_budgets is None
  budgets = HeadBudgets.from_dict(json.loads(BUDGETS.to_json()))
  assert budgets == BUDGETS


def test_budgets_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"head_budgets is None.*with attention='head_budgets'"):
    dataclasses.replace(CONFIG, attention="head_budgets")
  with pytest.raises(ValueError, match="has 3 layers of 3 KV heads; it must have num_layers=2"):
    dataclasses.replace(CONFIG, num_layers=2, head_budgets=BUDGETS)
  with pytest.raises(ValueError, match=r"HeadBudgets\.settings\[1\]\.group_size is 0"):
    HeadBudgets.from_dict({"settings": ["full", {"group_size": 0}], "assignment": [[0]]})
  with pytest.raises(ValueError, match=r"HeadBudgets\.settings\[0\]\.window is 0.*at least 1"):
    HeadBudgets.from_dict({"settings": [{"window": 0}], "assignment": [[0]]})
  with pytest.raises(ValueError, match=r"SinkWindow\.sinks is -1"):
    SinkWindow(4, sinks=-1)
  with pytest.raises(ValueError, match="parts is 2; it must divide the 3 KV heads"):
    apply_budgets(DENSE, BUDGETS, parts=2)
  with pytest.raises(ValueError, match=r"before Decoder\.unstack_layers"):
    apply_budgets(DENSE.unstack_layers(), BUDGETS)
  with pytest.raises(ValueError, match="model has head budgets already"):
    apply_budgets(MODEL, BUDGETS)


def test_meshes_compute_what_one_device_computes():
  """Devices are counted when jax starts, so this takes a process of its own."""
  flags = "--xla_force_host_platform_device_count=4"
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-m", "tests.dga_jax.model.check_head_budgets_on_mesh"],
    check=False,
    cwd=Path(__file__).parents[3],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
