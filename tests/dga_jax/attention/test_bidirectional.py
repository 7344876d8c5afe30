"""Properties of bidirectional attention, `DGAConfig(causal=False)`.

`test_semantics` and `test_implementations` compare its values and gradients with the oracle.
"""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dga_jax import DGAConfig, dynamic_group_attention, explain, GroupPlan, HeadBudgets, plan_groups
from dga_jax.attention.context_parallel.attend import attend_sharded
from dga_jax.attention.metadata import prepare
from dga_jax.attention.segments import find_documents
from dga_jax.cache import decode_step, empty_cache, extend, prefill
from dga_jax.model.config import ModelConfig
from tests.dga_jax.attention.cases import arrays

GLOBAL = DGAConfig(
  causal=False, group_size=4, min_focal_tokens=0, n_recent=4, n_random=3, importance_rate=0.2
)
STREAMING = dataclasses.replace(GLOBAL, selection="streaming", max_documents=3)
L = 41

forward = jax.jit(dynamic_group_attention, static_argnames=("config", "implementation"))


def dense(q, k, v):
  """Softmax attention to all tokens in NumPy, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (x.repeat(q.shape[2] // k.shape[2], axis=2) for x in (k, v))
  logits = np.einsum("blhd,bmhd->bhlm", q, k) / np.sqrt(q.shape[-1])
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return np.einsum("bhlm,bmhd->blhd", weights / weights.sum(axis=-1, keepdims=True), v)


def plan_of(mask_L):
  """The plan of one row and one KV head with this focal mask."""
  return GroupPlan.from_focal_mask(jnp.asarray(mask_L)[None, None], config=GLOBAL)


def attend(q, k, v, mask_L):
  return np.asarray(forward(q, k, v, config=GLOBAL, plan=plan_of(mask_L)))


@pytest.mark.parametrize(
  "config",
  [
    dataclasses.replace(GLOBAL, importance_rate=1.0),
    dataclasses.replace(GLOBAL, min_focal_tokens=1024),
    dataclasses.replace(GLOBAL, group_size=1),
    dataclasses.replace(STREAMING, group_size=1),
    dataclasses.replace(STREAMING, group_size=1, sink_tokens=3, local_window=2),
    dataclasses.replace(STREAMING, local_window=100),
  ],
  ids=["rate 1", "floor", "m1", "streaming m1", "streaming m1 sinks", "window of the row"],
)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_equals_dense_attention(config, implementation):
  q, k, v, _ = arrays(0, 2, L, 4, 2, 8)
  out = forward(q, k, v, config=config, implementation=implementation)
  np.testing.assert_allclose(out, dense(q, k, v), atol=2e-6)


@st.composite
def groups_of_four(draw):
  """A focal mask of 41 tokens, 13 of them focal."""
  order = np.random.default_rng(draw(st.integers(0, 999))).permutation(L)
  return order < 13


@settings(max_examples=12)
@given(mask_L=groups_of_four(), seed=st.integers(0, 99))
def test_reversal(mask_L, seed):
  """Where all queries are equal, no query weighs members otherwise: reversal is exact."""
  q, k, v, _ = arrays(seed, 1, L, 2, 1, 4)
  q = jnp.broadcast_to(q[:, :1], q.shape)
  backward = attend(q[:, ::-1], k[:, ::-1], v[:, ::-1], mask_L[::-1])
  np.testing.assert_allclose(backward[:, ::-1], attend(q, k, v, mask_L), atol=2e-6)


@settings(max_examples=12)
@given(mask_L=groups_of_four(), seed=st.integers(0, 99))
def test_a_permutation_of_focal_keys_changes_no_output(mask_L, seed):
  q, k, v, _ = arrays(seed, 1, L, 2, 1, 4)
  focal = np.flatnonzero(mask_L)
  order = np.arange(L)
  order[focal] = np.random.default_rng(seed).permutation(focal)
  np.testing.assert_allclose(
    attend(q, k[:, order], v[:, order], mask_L), attend(q, k, v, mask_L), atol=2e-6
  )


@settings(max_examples=12)
@given(mask_L=groups_of_four(), seed=st.integers(0, 99), data=st.data())
def test_an_exchange_of_groups_moves_the_outputs_of_their_members_alone(mask_L, seed, data):
  """Other queries see both groups merged, except focal queries between members of a group."""
  members_KxM = np.flatnonzero(~mask_L).reshape(-1, 4)
  first, second = (data.draw(st.integers(0, len(members_KxM) - 1)) for _ in range(2))
  order = np.arange(L)
  order[members_KxM[first]], order[members_KxM[second]] = members_KxM[second], members_KxM[first]
  q, k, v, _ = arrays(seed, 1, L, 2, 1, 4)
  out, moved = attend(q, k, v, mask_L), attend(q[:, order], k[:, order], v[:, order], mask_L)
  inside_L = np.zeros(L, bool)
  for group in (first, second):
    inside_L[members_KxM[group, 0] : members_KxM[group, -1] + 1] = True
  kept_L = ~(inside_L & mask_L)
  np.testing.assert_allclose(moved[:, kept_L], out[:, order][:, kept_L], atol=2e-6)


@pytest.mark.parametrize("equal", [True, False])
def test_equal_keys_of_a_group_count_through_their_mean_value_alone(equal):
  mask_L = np.arange(L) >= 28
  q, k, v, _ = arrays(3, 1, L, 2, 1, 4)
  if equal:
    k = k.at[:, 20:24].set(k[:, 20:21])
  moved = v.at[:, 20].add(1.0).at[:, 21].add(-1.0)
  changed = np.abs(attend(q, k, v, mask_L) - attend(q, k, moved, mask_L)).max()
  assert changed < 1e-6 if equal else changed > 1e-3


@pytest.mark.parametrize("config", [GLOBAL, STREAMING], ids=lambda c: c.selection)
def test_the_first_output_depends_on_the_last_token(config):
  q, k, v, _ = arrays(0, 1, L, 2, 1, 4)
  changed = forward(q, k, v.at[:, -1].add(1.0), config=config)
  assert np.abs(changed - forward(q, k, v, config=config))[:, 0].min() > 1e-4


@pytest.mark.parametrize("config", [GLOBAL, STREAMING], ids=lambda c: c.selection)
def test_a_trailing_partial_group_is_focal(config):
  focal = np.zeros((1, 1, 23), bool)
  if config.selection == "streaming":
    focal[..., 4::5] = True
  plan = GroupPlan.from_focal_mask(jnp.asarray(focal), config=config)
  np.testing.assert_array_equal(plan.focal_mask[0, 0, 20:], True)
  assert int(plan.focal_mask.sum()) == (7 if config.selection == "streaming" else 3)


def test_no_buffer_grows_with_the_square_of_the_length():
  long = 4096
  shape = jax.ShapeDtypeStruct((1, long, 1, 8), jnp.float32)
  op = functools.partial(dynamic_group_attention, config=STREAMING, implementation="xla")
  program = jax.jit(op).lower(shape, shape, shape).compile().as_text()
  assert f"{long},{long}" not in program


def test_explain_lists_no_op_of_decoding():
  q, k, v, _ = arrays(0, 1, L, 2, 1, 4)
  ops = [choice.op for choice in explain(q, k, v, config=GLOBAL).ops]
  assert "grouped_attention" in ops
  assert not any("decode" in op for op in ops)


def _tokens(length):
  return arrays(0, 1, length, 2, 1, 4)[:3]


def _attend_sharded(config):
  metadata = prepare(find_documents(1, 40, None, None), config)
  return attend_sharded(*_tokens(40), metadata, axis_name="length")


def _extend(config, step):
  causal = dataclasses.replace(config, causal=True)
  sizes = {"batch": 1, "max_length": 64, "num_kv_heads": 1, "head_dim": 4, "dtype": jnp.float32}
  q, k, v, _ = arrays(0, 1, 1, 2, 1, 4)
  if step is decode_step:
    q, k, v = q[:, 0], k[:, 0], v[:, 0]
  return step(q, k, v, empty_cache(config=causal, **sizes), config=config)


@pytest.mark.invalid_arguments
@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda c: empty_cache(config=c, batch=1, max_length=9, num_kv_heads=1, head_dim=4,
                           dtype=jnp.float32), "a cache needs causal=True"),
    (lambda c: prefill(*_tokens(9)[1:], _tokens(9)[0], config=c, max_length=9),
     "a cache needs causal=True"),
    (lambda c: _extend(c, decode_step), "a cache needs causal=True"),
    (lambda c: _extend(c, extend), "a cache needs causal=True"),
    (_attend_sharded, "context parallelism needs causal=True"),
    (lambda c: HeadBudgets((c,), ((0,),)), "causal=True"),
    (lambda c: ModelConfig(9, 1, 8, 1, 1, 8, 8, dga=c), "the decoder predicts the next token"),
    (lambda c: dataclasses.replace(c, visibility="exclusive"), "visibility is 'exclusive'"),
    (lambda c: dataclasses.replace(c, cache_dtype="int8"), "cache_dtype is 'int8'"),
    (lambda c: dataclasses.replace(c, causal=1), "causal is 1"),
  ],
)  # fmt: skip
def test_refusals(call, message):
  with pytest.raises(ValueError, match=message):
    call(STREAMING)


def test_plans_of_a_config_fit_that_config_alone():
  q, k, v, _ = arrays(0, 1, L, 2, 1, 4)
  plan = plan_groups(q, k, config=GLOBAL)
  with pytest.raises(ValueError, match=r"causal=False.*causal=True"):
    forward(q, k, v, config=dataclasses.replace(GLOBAL, causal=True), plan=plan)
