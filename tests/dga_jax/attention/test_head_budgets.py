"""The op with a setting for each head equals, head by head, the op with that head's setting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dga_jax import (
  DGAConfig,
  dynamic_group_attention,
  explain,
  HeadBudgets,
  plan_groups,
  SinkWindow,
)
from dga_jax.attention.head_classes import HeadClasses
from tests.dga_jax.attention.cases import arrays
from tests.pallas_kernels import h100, tpu

B, L, N, R, D = 2, 23, 4, 2, 8
SETTINGS = (
  "full",
  DGAConfig(selection="streaming", group_size=3, focal_per_block=1, max_documents=4),
  DGAConfig(
    selection="streaming",
    group_size=2,
    focal_per_block=2,
    sink_tokens=2,
    local_window=1,
    max_documents=4,
  ),
  SinkWindow(5, sinks=2),
)
ROWS = ((0, 1, 1, 2), (2, 0, 3, 0), (3, 3, 0, 3))


def budgets_of(row):
  return HeadBudgets(SETTINGS, (row,))


def causal(q, k, v, *, lengths, segment_ids, sinks=0, window=L):
  """Causal attention to sinks and a window inside each document; padding gives 0."""
  i = jnp.arange(L)
  ids = jnp.where(i[None] < lengths[:, None], segment_ids, -1)
  new_run = jnp.concatenate([jnp.ones((B, 1), bool), ids[:, 1:] != ids[:, :-1]], axis=1)
  run = jnp.where(ids < 0, -1, jnp.cumsum(new_run, axis=1))
  sees = (run[:, :, None] == run[:, None, :]) & (i[:, None] >= i[None])[None]
  sees = sees & (run >= 0)[:, :, None]
  in_document = jnp.stack([(run[:, :j] == run[:, j, None]).sum(axis=1) for j in range(L)], axis=1)
  sees = sees & ((in_document < sinks)[:, None] | (i[:, None] - i[None] < window)[None])
  k, v = (jnp.repeat(x, R, axis=2) for x in (k, v))
  logits = jnp.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(D)
  weights = jax.nn.softmax(jnp.where(sees[:, None], logits, -1e30))
  return jnp.einsum("bhij,bjhd->bihd", jnp.where(sees[:, None], weights, 0), v)


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def run(q, k, v, t, lengths, segment_ids, *, config, implementation=None):
  """Output, and gradients of its inner product with t."""
  rows = {"lengths": lengths, "segment_ids": segment_ids}

  def op(q, k, v):
    if config == "full":
      return causal(q, k, v, **rows)
    if isinstance(config, SinkWindow):
      return causal(q, k, v, **rows, sinks=config.sinks, window=config.window)
    return dynamic_group_attention(q, k, v, config=config, implementation=implementation, **rows)

  out, pull = jax.vjp(op, q, k, v)
  return out, *pull(t)


@st.composite
def documents(draw):
  """Lengths and segment ids of packed, right-padded rows with at most four documents."""
  lengths = draw(st.lists(st.integers(0, L), min_size=B, max_size=B))
  cuts = draw(st.lists(st.lists(st.integers(1, L - 1), max_size=3), min_size=B, max_size=B))
  ids = [[sum(cut <= i for cut in row) for i in range(L)] for row in cuts]
  return np.array(lengths, np.int32), np.array(ids, np.int32)


@pytest.mark.parametrize("row", ROWS)
@settings(max_examples=10, deadline=None)
@given(documents(), st.integers(0, 2**16))
def test_every_head_follows_its_setting(row, rows, seed):
  inputs = (*arrays(seed, B, L, N * R, N, D), *rows)
  got = run(*inputs, config=budgets_of(row))
  for setting in set(row):
    want = run(*inputs, config=SETTINGS[setting])
    kv_heads = np.flatnonzero(np.array(row) == setting)
    heads = (kv_heads[:, None] * R + np.arange(R)).ravel()
    for ours, theirs, index in zip(got, want, (heads, heads, kv_heads, kv_heads), strict=True):
      np.testing.assert_allclose(ours[:, :, index], theirs[:, :, index], atol=3e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, L - 1), st.integers(0, 2**16))
def test_a_token_changes_no_earlier_output(token, seed):
  q, k, v, t = arrays(seed, B, L, N * R, N, D)
  rows = np.full(B, L, np.int32), np.zeros((B, L), np.int32)
  other = [x.at[:, token].add(1.0) for x in (q, k, v)]
  before = run(q, k, v, t, *rows, config=budgets_of(ROWS[1]))[0]
  after = run(*other, t, *rows, config=budgets_of(ROWS[1]))[0]
  np.testing.assert_array_equal(before[:, :token], after[:, :token])
  assert np.abs(before[:, token] - after[:, token]).min(axis=-1).max() > 0


@pytest.mark.parametrize("row", [ROWS[0], ROWS[2]])
def test_padding_reaches_no_token(row):
  q, k, v, t = arrays(0, B, L, N * R, N, D)
  rows = np.array([9, 0], np.int32), np.zeros((B, L), np.int32)
  want = run(q, k, v, t, *rows, config=budgets_of(row))
  is_token = (np.arange(L)[None] < rows[0][:, None])[..., None, None]
  q, k, v = (jnp.where(is_token, x, jnp.nan) for x in (q, k, v))
  for got, expected in zip(run(q, k, v, t, *rows, config=budgets_of(row)), want, strict=True):
    np.testing.assert_array_equal(np.where(is_token, got, 0), np.where(is_token, expected, 0))
    assert np.isfinite(expected).all()


def test_the_reference_is_the_op():
  ids = np.repeat([[0, 1], [5, 5]], [11, 12], axis=1).astype(np.int32)
  inputs = (*arrays(3, B, L, N * R, N, D), np.array([L, 17], np.int32), ids)
  config = budgets_of(ROWS[1])
  got = run(*inputs, config=config)
  for ours, theirs in zip(
    got, run(*inputs, config=config, implementation="reference"), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=3e-5)


def test_the_scale_holds_for_all_heads():
  q, k, v, _ = arrays(0, B, L, N * R, N, D)
  config = budgets_of((0, 1, 3, 2))
  got = jax.jit(lambda: dynamic_group_attention(q, k, v, config=config, scale=0.3))()
  # The merge weights do not follow the scale, so each class is compared with its own op.
  rows = {"lengths": jnp.full(B, L), "segment_ids": jnp.zeros((B, L), int)}
  plain = jax.jit(causal, static_argnames=("sinks", "window"))
  full = plain(q * 0.3 * np.sqrt(D), k, v, **rows)
  dga = jax.jit(lambda: dynamic_group_attention(q, k, v, config=SETTINGS[2], scale=0.3))()
  window = plain(q * 0.3 * np.sqrt(D), k, v, **rows, sinks=2, window=5)
  np.testing.assert_allclose(got[:, :, :2], full[:, :, :2], atol=2e-5)
  np.testing.assert_allclose(got[:, :, 4:6], window[:, :, 4:6], atol=2e-5)
  np.testing.assert_allclose(got[:, :, 6:], dga[:, :, 6:], atol=2e-5)


def test_adjacent_heads_are_slices():
  """No gather, and as many concatenations as results are joined: one."""
  q, k, _, _ = arrays(0, B, L, N * R, N, D)
  x, classes = q, HeadClasses((1, 1, 0, 2))
  program = str(jax.make_jaxpr(lambda x: classes.map(lambda setting, x: x * 2, x))(x))
  assert "gather" not in program
  assert program.count("concatenate") == 1
  np.testing.assert_array_equal(HeadClasses((2, 0, 1, 0)).map(lambda _, x: x, q), q)
  np.testing.assert_array_equal(HeadClasses((2, 0, 1, 0)).take(k, 0), k[:, :, [1, 3]])


def test_explain_lists_the_ops_of_all_classes():
  query = jax.ShapeDtypeStruct((1, 512, 4, 64), jnp.bfloat16)
  key = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)
  settings = ("full", DGAConfig(selection="streaming"), SinkWindow(128))
  budgets = HeadBudgets(settings, ((0, 1),))
  windows = HeadBudgets(settings, ((2, 2),))
  with jax.sharding.use_abstract_mesh(h100.abstract_mesh()):
    found = explain(query, key, key, config=budgets)
    of_windows = explain(query, key, key, config=windows)
  runs = {choice.op: choice.runs for choice in found.ops}
  ops = {"dense_attention", "merge_blocks", "grouped_attention", "attend_heads", "decode_heads"}
  assert runs.keys() == ops
  assert runs["grouped_attention"] == "mosaic_gpu"
  assert of_windows["grouped_attention"].runs == "mosaic_gpu"
  assert "runs on a TPU" in found["dense_attention"].reason("splash")


def test_windows_run_in_the_kernels_of_grouped_attention():
  """Values and gradients, whole and packed rows; kernels are lowered, not compiled."""
  query = jax.ShapeDtypeStruct((1, 512, 4, 64), jnp.bfloat16)
  key = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)
  ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)
  budgets = HeadBudgets((SinkWindow(100), SinkWindow(200, sinks=0)), ((0, 1),))

  def loss(q, k, v, ids=None):
    return dynamic_group_attention(q, k, v, config=budgets, segment_ids=ids).astype(float).sum()

  gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
  for rows in ((), (ids,)):
    program = h100.lower_for_h100(gradient, query, key, key, *rows)
    assert program.count("mosaic_gpu") >= 2 * 3  # Forward, dq and dk/dv of two settings.
    assert tpu.lower_for_tpu(gradient, query, key, key, *rows).count("tpu_custom_call") >= 2 * 3


def test_wrong_budgets_are_refused():
  q, k, v, _ = arrays(0, B, L, N * R, N, D)
  with pytest.raises(ValueError, match=r"one layer with 4 KV heads. Pass budgets.layer"):
    dynamic_group_attention(q, k, v, config=HeadBudgets(SETTINGS, (ROWS[0], ROWS[1])))
  with pytest.raises(ValueError, match="config is HeadBudgets of 1 layers with 3 KV heads"):
    dynamic_group_attention(q, k, v, config=budgets_of((0, 1, 2)))
  plan = plan_groups(q, k, config=SETTINGS[1])
  with pytest.raises(ValueError, match="Leave the plan out"):
    dynamic_group_attention(q, k, v, config=budgets_of(ROWS[0]), plan=plan)


def test_contiguous_order_deals_every_class_to_all_parts():
  budgets = HeadBudgets(SETTINGS, ((1, 0, 1, 0), (2, 1, 0, 0)))
  order = budgets.contiguous_order()
  assert budgets.permute_kv_heads(order).assignment == ((0, 0, 1, 1), (0, 0, 1, 2))
  dealt = budgets.permute_kv_heads(budgets.contiguous_order(2))
  assert dealt.assignment == ((0, 1, 0, 1), (0, 1, 0, 2))
  # Heads in the order stay where they are: budgets do not record a move among equal settings.
  assert dealt.contiguous_order(2) == ((0, 1, 2, 3),) * 2
  assert HeadBudgets(SETTINGS, ((1, 1, 1, 1),)).contiguous_order(2) == ((0, 1, 2, 3),)
  with pytest.raises(ValueError, match="parts is 3; it must divide the 4 KV heads"):
    budgets.contiguous_order(3)
