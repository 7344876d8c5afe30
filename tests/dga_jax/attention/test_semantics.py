"""Properties of the mechanism that hold for every implementation."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dga_jax import DGAConfig, dynamic_group_attention, GroupPlan, plan_groups
from dga_jax.attention.reference import write_masks
from dga_jax.attention.scores import sample_queries
from dga_jax.attention.segments import find_documents
from tests.dga_jax.attention.cases import (
  arrays,
  CONFIGS,
  dense,
  documents_of,
  fixed_mask_plan,
  rows,
)
from tests.dga_jax.oracle import Oracle

forward = jax.jit(dynamic_group_attention, static_argnames=("config", "scale", "implementation"))

BOTH = pytest.mark.parametrize("implementation", ["reference", "xla"])


@BOTH
@pytest.mark.parametrize(
  "config",
  [
    DGAConfig(importance_rate=1.0, min_focal_tokens=0),
    DGAConfig(importance_rate=1.0, min_focal_tokens=0, visibility="exclusive"),
    DGAConfig(group_size=1, min_focal_tokens=0),
    DGAConfig(group_size=1, min_focal_tokens=0, visibility="exclusive"),
    DGAConfig(group_size=1, selection="streaming"),
    DGAConfig(group_size=1, selection="streaming", sink_tokens=3, local_window=2),
    DGAConfig(min_focal_tokens=37),
    DGAConfig(min_focal_tokens=1024, complementary=False),
  ],
  ids=lambda c: f"{c.selection}-m{c.group_size}-rate{c.importance_rate}-{c.visibility}",
)
def test_equals_causal_attention(config, implementation):
  """γ = 1, m = 1, and lengths up to min_focal_tokens reduce DGA to dense causal attention."""
  q, k, v, _ = arrays(0, 2, 37, 4, 2, 8)
  out = forward(q, k, v, config=config, implementation=implementation)
  np.testing.assert_allclose(out, dense(q, k, v), atol=2e-6)


# The example of Figure 1 of the paper, with its 1-based positions.
GOLDEN_CONFIG = DGAConfig(group_size=3, min_focal_tokens=0)
GOLDEN_FOCAL = (4, 7, 9)
GOLDEN_COMPLEMENTARY = {1: {1}, 2: {1, 2}, 5: {5}, 6: {5, 6}, 7: {5, 6}}


class TestGoldenExample:
  def test_masks(self):
    mask = np.isin(np.arange(1, 10), GOLDEN_FOCAL)
    masks = write_masks(jnp.asarray(mask), jnp.zeros(9, jnp.int32), GOLDEN_CONFIG)
    members = {g + 1: set(np.flatnonzero(masks.member[g]) + 1) for g in (0, 4)}
    assert members == {1: {1, 2, 3}, 5: {5, 6, 8}}
    assert not np.delete(masks.member, (0, 4), axis=0).any()
    for i in range(1, 10):
      tokens = set(np.flatnonzero(masks.sees_token[i - 1]) + 1)
      assert tokens - set(GOLDEN_FOCAL) == GOLDEN_COMPLEMENTARY.get(i, set()), i
      assert tokens & set(GOLDEN_FOCAL) == {j for j in GOLDEN_FOCAL if j <= i}
      assert masks.sees_group[i - 1, 0] == (i >= 3)
      assert masks.sees_group[i - 1, 4] == (i >= 8)

  def test_ranges(self):
    plan = fixed_mask_plan([f - 1 for f in GOLDEN_FOCAL], 9, GOLDEN_CONFIG)
    np.testing.assert_array_equal(plan.layout.focal_index[0, 0] + 1, GOLDEN_FOCAL)
    np.testing.assert_array_equal(plan.layout.member_index[0, 0] + 1, [[1, 2, 3], [5, 6, 8]])
    members = np.array([1, 2, 3, 5, 6, 8])
    for i in range(1, 10):
      start, end = (int(x[0, 0, i - 1]) for x in plan.visibility.ranges[2])
      assert set(members[start:end]) == GOLDEN_COMPLEMENTARY.get(i, set()), i
      assert plan.visibility.focal_end[0, 0, i - 1] == sum(f <= i for f in GOLDEN_FOCAL)
      assert plan.visibility.group_end[0, 0, i - 1] == (i >= 3) + (i >= 8)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=8)
@given(data=st.data())
def test_each_document_equals_the_oracle_on_that_document_alone(name, data):
  """Covers selection, merging and visibility on padded and packed rows."""
  B, L = 2, 40
  where = data.draw(rows(B, L))
  q, k, v, _ = arrays(data.draw(st.integers(0, 99)), B, L, 4, 2, 4)
  out = np.array(forward(q, k, v, config=CONFIGS[name], scale=0.4, **where))
  for b, part in documents_of(B, L, **where):
    want = Oracle(q[b, part], k[b, part], v[b, part], CONFIGS[name], scale=0.4)()
    np.testing.assert_allclose(out[b, part], want, atol=2e-5)
    out[b, part] = 0
  np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("streaming")])
def test_streaming_is_causal_bit_for_bit(name):
  L = 40
  q, k, v, _ = arrays(0, 1, L, 4, 2, 4)
  out = forward(q, k, v, config=CONFIGS[name])
  for t in (1, 17, 18, 39):
    new = forward(*(x.at[:, t].add(3.0) for x in (q, k, v)), config=CONFIGS[name])
    np.testing.assert_array_equal(out[:, :t], new[:, :t])
    assert not np.array_equal(out[:, t], new[:, t])


@pytest.mark.parametrize("name", ["streaming-sinks-window", "streaming-window2-bias"])
@pytest.mark.parametrize("array", ["query", "key"])
def test_a_nan_reaches_only_later_queries(name, array):
  """Also where the last query of a block makes all merge weights of the block NaN."""
  L = 40
  inputs = dict(zip(("query", "key", "value"), arrays(0, 1, L, 4, 2, 4), strict=False))
  op = functools.partial(forward, config=CONFIGS[name])
  out = op(**inputs)
  for t in (1, 17, 18, 27):
    new = op(**inputs | {array: inputs[array].at[:, t].set(jnp.nan)})
    np.testing.assert_array_equal(out[:, :t], new[:, :t])
    assert np.isnan(new[:, t]).all()


def test_global_selection_is_not_causal_and_a_fixed_plan_is():
  config = DGAConfig(group_size=4, min_focal_tokens=0, n_recent=4, n_random=4)
  q, k, v, _ = arrays(0, 1, 64, 2, 1, 4)
  t = 60
  changed = [x.at[:, t:].add(3.0) for x in (q, k, v)]

  def out(q, k, v, plan=None):
    return forward(q, k, v, config=config, plan=plan)

  plan = plan_groups(q, k, config=config)
  assert not np.array_equal(out(q, k, v)[:, :t], out(*changed)[:, :t])
  np.testing.assert_array_equal(out(q, k, v, plan)[:, :t], out(*changed, plan)[:, :t])


@settings(max_examples=40)
@given(
  length=st.integers(1, 300),
  m=st.integers(1, 40),
  rate=st.integers(0, 100).map(lambda p: p / 100),
  floor=st.sampled_from([0, 7, 1024]),
)
def test_quota(length, m, rate, floor):
  """r₀ = min(L, max(⌈γL⌉, floor)) and r = r₀ + ((L − r₀) mod m), in exact integers."""
  config = DGAConfig(group_size=m, importance_rate=rate, min_focal_tokens=floor)
  r0 = min(length, max(-(-round(rate * 100) * length // 100), floor))
  r = int(config.focal_quota(length)[length])
  assert r == r0 + (length - r0) % m
  assert (length - r) % m == 0


def test_sampled_queries_contain_the_recent_positions_once():
  config = DGAConfig(n_recent=3, n_random=4, seed=5)
  samples = sample_queries(find_documents(1, 33, None, None), 1, config)
  positions = np.asarray(samples.position[0, 0])
  np.testing.assert_array_equal(samples.end[0, 0], positions + 1)
  assert set(positions[:3]) == {30, 31, 32}
  assert len(set(positions)) == 7


def test_ties_select_the_earlier_position():
  k = jnp.ones((1, 24, 1, 4))
  config = DGAConfig(group_size=4, min_focal_tokens=0, n_recent=1, n_random=1)
  mask = plan_groups(k, k, config=dataclasses.replace(config, n_random=0)).focal_mask
  np.testing.assert_array_equal(np.flatnonzero(mask), np.arange(4))
  streaming = dataclasses.replace(config, selection="streaming", focal_per_block=2)
  mask = plan_groups(k, k, config=streaming).focal_mask
  np.testing.assert_array_equal(np.flatnonzero(mask) % 6, [0, 1] * 4)


def test_random_selection_repeats_for_a_seed_and_differs_by_seed_and_head():
  q, k, *_ = arrays(0, 1, 200, 4, 2, 4)
  masks = [
    np.asarray(
      plan_groups(
        q, k, config=DGAConfig(selection="random", min_focal_tokens=0, seed=seed)
      ).focal_mask[0]
    )
    for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(masks[0], masks[1])
  assert not np.array_equal(masks[0], masks[2])
  assert not np.array_equal(masks[0][0], masks[0][1])


@pytest.mark.parametrize("name", ["global-exclusive-sinks"])
def test_any_focal_mask_makes_a_plan(name):
  """An incomplete group at the end of a document stays raw. Under jit max_focal is required."""
  config, L = CONFIGS[name], 30
  ids = np.repeat([[0, 1, 2], [0, 1, -1]], [11, 14, 5], axis=1).astype(np.int32)
  q, k, v, _t = arrays(0, 2, L, 2, 2, 4)
  with pytest.raises(ValueError, match="max_focal"):
    jax.jit(lambda m: GroupPlan.from_focal_mask(m, config=config))(np.ones((1, 1, L), bool))

  @jax.jit
  def traced(mask):
    plan = GroupPlan.from_focal_mask(mask, config=config, max_focal=L, segment_ids=ids)
    return [
      dynamic_group_attention(q, k, v, config=config, plan=plan, implementation=implementation)
      for implementation in ("xla", "reference")
    ]

  for share in (0.0, 0.3, 0.6, 1.0):
    mask = jax.random.bernoulli(jax.random.key(1), share, (2, 2, L))
    got, want = traced(mask)
    np.testing.assert_allclose(got, want, atol=2e-5)
  plan = GroupPlan.from_focal_mask(mask, config=config, segment_ids=ids)  # All tokens are focal.
  np.testing.assert_allclose(forward(q, k, v, config=config, plan=plan), want, atol=2e-5)


def test_rows_beyond_a_static_bound_under_jit_are_nan():
  config = DGAConfig(group_size=2, min_focal_tokens=0, max_documents=2)
  q, k, v, _ = arrays(0, 1, 12, 1, 1, 4)
  ids = np.repeat(np.arange(3), 4)[None].astype(np.int32)
  op = jax.jit(lambda ids: dynamic_group_attention(q, k, v, config=config, segment_ids=ids))
  out = op(ids)
  assert np.isfinite(out[:, :8]).all()
  assert np.isnan(out[:, 8:]).all()
  mask = np.ones((1, 1, 12), bool)
  plan = jax.jit(lambda m: GroupPlan.from_focal_mask(m, config=config, max_focal=5))(mask)
  assert np.isnan(dynamic_group_attention(q, k, v, config=config, plan=plan)).all()


def test_gradients_flow_through_merge_weights():
  """The query that weights a group's members gets a gradient from a query that sees the group."""
  config = DGAConfig(group_size=4, min_focal_tokens=0, visibility="exclusive")
  q, k, v, _ = arrays(0, 1, 9, 1, 1, 4)
  plan = fixed_mask_plan([8], 9, config)

  def last(q):
    return dynamic_group_attention(q, k, v, config=config, plan=plan)[:, 8].sum()

  gradient = np.array(jax.grad(last)(q)[0, :, 0])
  assert np.abs(gradient[[3, 7, 8]]).min(axis=-1).min() > 0
  np.testing.assert_array_equal(gradient[[0, 1, 2, 4, 5, 6]], 0)
