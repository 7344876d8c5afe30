"""The selector "fitted": focal scores, not the last query, choose the focal tokens of a block."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dga_jax import DGAConfig, dynamic_group_attention, explain, HeadBudgets, plan_groups
from dga_jax.attention.reference import number_documents, reference_attention
from dga_jax.cache import attend_and_prefill, decode_step, empty_cache, extend, prefill
from dga_jax.flax import attention_fn
from dga_jax.model.attention_kinds.dga import DynamicGroupAttention
from tests.dga_jax.attention.cases import arrays, CONFIGS, documents_of, rows

FITTED = {
  name: dataclasses.replace(config, selector="fitted")
  for name, config in CONFIGS.items()
  if name in ("streaming", "streaming-sinks-window", "streaming-window2-bias")
}
SMALL = DGAConfig(selection="streaming", group_size=3, focal_per_block=2, selector="fitted")
B, L, H, N, D = 2, 41, 4, 2, 4


def draw_scores(seed, *shape):
  """Scores with many ties, both zeros and infinities."""
  values = np.array([-np.inf, -1.5, -0.0, 0.0, 0.5, 0.5, 2.0, np.inf], np.float32)
  return jnp.asarray(np.random.default_rng(seed).choice(values, shape))


def best_tokens(scores, config, **where):
  """The focal mask [B, N, L]: sinks, and the f best tokens of each block, in plain Python."""
  batch, length, heads = scores.shape
  mask = np.zeros((batch, heads, length), bool)
  for b, document in documents_of(batch, length, **where):
    begin = min(document.start + config.sink_tokens, document.stop)
    mask[b, :, document.start : begin] = True
    for start in range(begin, document.stop - config.block_size + 1, config.block_size):
      for n in range(heads):
        block = range(start, start + config.block_size)
        best = sorted(block, key=lambda j: (-float(scores[b, j, n]), j))
        mask[b, n, best[: config.focal_in_block]] = True
  return jnp.asarray(mask)


# Jitted, because otherwise each operation is compiled on its own.
op = jax.jit(dynamic_group_attention, static_argnames=("config", "implementation"))


@functools.partial(jax.jit, static_argnames="config")
def run(q, k, v, t, scores, *, config, **where):
  """The focal mask of the plan, the output, and the gradients of q, k, v and the scores."""

  def attend(q, k, v, scores):
    return dynamic_group_attention(q, k, v, config=config, focal_scores=scores, **where)

  out, pull = jax.vjp(attend, q, k, v, scores)
  plan = plan_groups(q, k, config=config, focal_scores=scores, **where)
  return plan.focal_mask, (out, *pull(t))


@functools.partial(jax.jit, static_argnames="config")
def run_reference(q, k, v, t, mask, document, *, config):
  """The output and the gradients of q, k and v under a focal mask."""
  reference = functools.partial(reference_attention, config=config, scale=D**-0.5)
  out, pull = jax.vjp(lambda q, k, v: reference(q, k, v, mask, document), q, k, v)
  return out, *pull(t)


@pytest.mark.parametrize("name", FITTED)
@settings(max_examples=3)
@given(data=st.data())
def test_outputs_and_gradients_are_those_of_the_best_tokens(name, data):
  """Padded and packed rows; the masks and the focal tokens come from code of the test alone."""
  config, where = FITTED[name], data.draw(rows(B, L))
  seed = data.draw(st.integers(0, 99))
  q, k, v, t = arrays(seed, B, L, H, N, D)
  scores = draw_scores(seed, B, L, N)
  mask, document = best_tokens(scores, config, **where), number_documents(B, L, *where.values())
  want = run_reference(q, k, v, t, mask, document, config=config)
  chosen, (*got, of_scores) = run(q, k, v, t, scores, config=config, **where)
  np.testing.assert_array_equal(chosen & (document >= 0)[:, None], mask)
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, atol=2e-5)
  assert not np.asarray(of_scores).any()


def test_scores_of_the_last_query_give_the_choice_of_the_last_query():
  q, k, v, _ = arrays(0, B, 40, H, N, D)
  config = dataclasses.replace(SMALL, selector="last_query")
  mask = plan_groups(q, k, config=config).focal_mask
  scores = mask.swapaxes(1, 2).astype(jnp.float32)
  want = op(q, k, v, config=config)
  for implementation in ("xla", "reference"):
    out = op(q, k, v, config=SMALL, focal_scores=scores, implementation=implementation)
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_a_later_token_and_its_score_change_no_earlier_output():
  q, k, v, _ = arrays(1, B, L, H, N, D)
  scores = draw_scores(3, B, L, N)
  before = op(q, k, v, config=SMALL, focal_scores=scores)
  changed = [x.at[:, 23].add(3.0) for x in (q, k, v)]
  after = op(*changed, config=SMALL, focal_scores=scores.at[:, 23].set(jnp.nan))
  np.testing.assert_array_equal(before[:, :23], after[:, :23])
  assert (np.asarray(before[:, 23]) != np.asarray(after[:, 23])).all()


def test_vmap_unbatched_arrays_and_half_precision():
  q, k, v, _ = arrays(2, B, L, H, N, D)
  scores = draw_scores(4, B, L, N)
  want = op(q, k, v, config=SMALL, focal_scores=scores)
  alone = jax.vmap(lambda q, k, v, s: op(q, k, v, config=SMALL, focal_scores=s))(q, k, v, scores)
  np.testing.assert_allclose(alone, want, atol=1e-6)
  half = op(*(x.astype(jnp.bfloat16) for x in (q, k, v)), config=SMALL, focal_scores=scores)
  np.testing.assert_allclose(half.astype(jnp.float32), want, atol=0.05)


def test_heads_with_and_without_a_selector_in_one_layer():
  """Each KV head equals the op with its own setting; full heads ignore the scores."""
  last = dataclasses.replace(SMALL, selector="last_query", local_window=1)
  budgets = HeadBudgets(("full", SMALL, last), ((1, 0, 2, 1),))
  q, k, v, _ = arrays(5, B, L, 8, 4, D)
  scores = draw_scores(6, B, L, 4)
  out = op(q, k, v, config=budgets, focal_scores=scores)
  for n, setting in enumerate(budgets.assignment[0]):
    config = budgets.settings[setting]
    config = dataclasses.replace(last, local_window=L) if config == "full" else config
    own = scores[:, :, n : n + 1] if config.selector == "fitted" else None
    qkv = (q[:, :, 2 * n : 2 * n + 2], k[:, :, n : n + 1], v[:, :, n : n + 1])
    want = op(*qkv, config=config, focal_scores=own)
    np.testing.assert_allclose(out[:, :, 2 * n : 2 * n + 2], want, atol=1e-5)


@pytest.mark.parametrize(("sinks", "window", "cache_dtype"), [(0, 0, "int8"), (3, 2, None)])
def test_prefill_chunks_and_decoding_choose_alike(sinks, window, cache_dtype):
  """The caches of the three ways are equal, and so is what they attend to."""
  config = dataclasses.replace(
    SMALL, sink_tokens=sinks, local_window=window, cache_dtype=cache_dtype
  )
  q, k, v, _ = arrays(7, B, L, H, N, D)
  scores = draw_scores(8, B, L, N)
  lengths = jnp.array([L, 23])
  prefill_jit = jax.jit(attend_and_prefill, static_argnames=("config", "max_length"))
  want, whole = prefill_jit(
    q, k, v, config=config, max_length=L, focal_scores=scores, lengths=lengths
  )
  rows = jnp.arange(L)[None] < lengths[:, None]
  shape = dict(batch=B, max_length=L, num_kv_heads=N, head_dim=D, dtype=jnp.float32)
  chunked = decoded = empty_cache(config=config, **shape)
  for begin, end in ((0, 2), (2, 22), (22, L)):
    part = slice(begin, end)
    out, chunked = jax.jit(extend, static_argnames="config")(
      q[:, part], k[:, part], v[:, part], chunked, config=config, focal_scores=scores[:, part],
      lengths=rows[:, part].sum(axis=1),
    )  # fmt: skip
    if cache_dtype is None:
      np.testing.assert_allclose(
        out, jnp.where(rows[:, part, None, None], want[:, part], 0), atol=1e-5
      )
  step = jax.jit(decode_step, static_argnames="config")
  for t in range(23):
    token = (q[:, t], k[:, t], v[:, t])
    out, decoded = step(*token, decoded, config=config, focal_scores=scores[:, t])
    if cache_dtype is None:
      np.testing.assert_allclose(out, want[:, t], atol=1e-5)
  for name in ("compact_key", "compact_value", "raw_key", "raw_value", "block_score"):
    all_three = [np.asarray(getattr(c.arrays, name)) for c in (whole, chunked, decoded)]
    if cache_dtype == "int8" and name.startswith("compact"):
      assert (all_three[0] != all_three[1]).mean() < 0.01
      continue
    np.testing.assert_allclose(all_three[1], all_three[0], atol=1e-6, err_msg=name)
    if name.startswith("compact"):  # Row 1 has 23 tokens in all caches.
      np.testing.assert_allclose(all_three[2][1], all_three[0][1], atol=1e-6, err_msg=name)
  used = (23 - sinks) % config.block_size
  np.testing.assert_array_equal(
    decoded.arrays.block_score[1, :, :used], whole.arrays.block_score[1, :, :used]
  )
  assert whole.bytes == decoded.bytes


def test_explain_lists_the_ops_of_the_selector():
  q, k, v, _ = arrays(0, B, L, H, N, D)
  scores = draw_scores(0, B, L, N)
  ops = [choice.op for choice in explain(q, k, v, config=SMALL, focal_scores=scores).ops]
  assert {"merge_groups", "decode_attention"} <= set(ops)
  assert "merge_blocks" not in ops


@pytest.mark.invalid_arguments
def test_errors_name_the_argument():
  q, k, v, _ = arrays(0, B, L, H, N, D)
  scores = draw_scores(0, B, L, N)
  last = dataclasses.replace(SMALL, selector="last_query")
  for call in (dynamic_group_attention, functools.partial(prefill, max_length=L)):
    with pytest.raises(ValueError, match=r"focal_scores is None and config.selector is 'fitted'"):
      call(q, k, v, config=SMALL) if call is dynamic_group_attention else call(
        k, v, q, config=SMALL
      )
  with pytest.raises(
    ValueError, match=r"focal_scores is given and config.selector is 'last_query'"
  ):
    dynamic_group_attention(q, k, v, config=last, focal_scores=scores)
  with pytest.raises(ValueError, match=r"focal_scores is None and config.selector is 'fitted'"):
    plan_groups(q, k, config=SMALL)
  for wrong in (scores[:, :-1], scores.swapaxes(1, 2), scores.astype(jnp.bfloat16)):
    with pytest.raises(ValueError, match=r"focal_scores is .*; beside key \[2, 41, 2, 4\]"):
      dynamic_group_attention(q, k, v, config=SMALL, focal_scores=wrong)
  plan = plan_groups(q, k, config=SMALL, focal_scores=scores)
  with pytest.raises(ValueError, match=r"plan fixes the focal tokens"):
    dynamic_group_attention(q, k, v, config=SMALL, plan=plan, focal_scores=scores)
  with pytest.raises(ValueError, match=r"it must be .last_query., since nnx"):
    attention_fn(SMALL)
  with pytest.raises(ValueError, match=r"DGAConfig.selector is 'fitted'; it must be 'last_query'"):
    DGAConfig(selector="fitted")
  cache = empty_cache(
    config=last, batch=B, max_length=L, num_kv_heads=N, head_dim=D, dtype=jnp.float32
  )
  with pytest.raises(ValueError, match=r"config.selector is .* and the cache was made with"):
    decode_step(q[:, 0], k[:, 0], v[:, 0], cache, config=SMALL, focal_scores=scores[:, 0])


def test_a_cache_without_a_selector_has_no_scores():
  for selector, has_scores in (("last_query", False), ("fitted", True)):
    config = dataclasses.replace(SMALL, selector=selector)
    cache = DynamicGroupAttention(config).init_cache(B, L, N, D, jnp.float32)
    assert (cache.arrays.block_score is not None) == has_scores
