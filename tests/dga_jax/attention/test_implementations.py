"""Outputs and gradients of each implementation equal the dense-mask reference, for each config."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dga_jax import DGAConfig, dynamic_group_attention, plan_groups
from tests.dga_jax.attention.cases import arrays, CONFIGS, rows, run
from tests.nightly import nightly

NAMES = ("out", "dq", "dk", "dv")


SHAPES = [(41, 4, 2), (40, 2, 2), (37, 3, 1)]  # L, H, N


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=6)
@given(data=st.data())
def test_xla_equals_reference(name, data):
  """Outputs and gradients on padded and packed rows; the shapes depend on the config."""
  L, H, N = SHAPES[list(CONFIGS).index(name) % len(SHAPES)]
  where = data.draw(rows(2, L))
  inputs = arrays(data.draw(st.integers(0, 99)), 2, L, H, N, 4)
  options = dict(config=CONFIGS[name], scale=0.4, **where)
  got = run(*inputs, implementation="xla", **options)
  want = run(*inputs, implementation="reference", **options)
  for what, x, y in zip(NAMES, got, want, strict=True):
    np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5, err_msg=what)


@pytest.mark.parametrize("selection", ["global", "streaming"])
@pytest.mark.parametrize("length", [1, 17])
def test_rows_shorter_than_a_group_or_block(selection, length):
  inputs = arrays(0, 2, length, 4, 2, 8)
  config = DGAConfig(selection=selection, min_focal_tokens=0)
  got = run(*inputs, config=config, implementation="xla", lengths=jnp.array([length, 1]))
  want = run(*inputs, config=config, implementation="reference", lengths=jnp.array([length, 1]))
  for what, x, y in zip(NAMES, got, want, strict=True):
    np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5, err_msg=what)


@pytest.mark.parametrize("selection", ["global", "streaming"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, *nightly(jnp.float16)])
def test_half_precision_error_is_close_to_that_of_dense_attention(selection, dtype):
  """The error against float32 is at most 2 times (gradients 3 times) that of dense attention."""
  config = DGAConfig(selection=selection, min_focal_tokens=0)
  B, L, H, N, D = 1, 500, 4, 2, 32
  half = arrays(3, B, L, H, N, D, dtype)
  full = tuple(x.astype(jnp.float32) for x in half)

  def plain(q, k, v):
    """Dense causal attention: matrix products in the input dtype with float32 accumulation."""
    k, v = (x.repeat(H // N, axis=2) for x in (k, v))
    s_BxHxLxL = jnp.einsum("blhd,bmhd->bhlm", q, k, preferred_element_type=jnp.float32) / D**0.5
    s_BxHxLxL = jnp.where(jnp.tri(L, dtype=bool)[None, None], s_BxHxLxL, -jnp.inf)
    w_BxHxLxL = jax.nn.softmax(s_BxHxLxL).astype(q.dtype)
    out = jnp.einsum("bhlm,bmhd->blhd", w_BxHxLxL, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)

  def dense(q, k, v, t):
    out, pull = jax.vjp(plain, q, k, v)
    return out, *pull(t)

  def errors(f):
    return [
      float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y))
      for x, y in zip(f(half), f(full), strict=True)
    ]

  bounds = errors(lambda x: jax.jit(dense)(*x))
  # A shared plan, because rounding of half-precision scores may change the focal tokens.
  plan = jax.jit(lambda q, k: plan_groups(q, k, config=config))(*half[:2])

  def ours(x, implementation):
    def op(q, k, v):
      return dynamic_group_attention(
        q, k, v, config=config, plan=plan, implementation=implementation
      )

    out, pull = jax.vjp(op, *x[:3])
    return out, *pull(x[3])

  got = jax.jit(lambda x: ours(x, "xla"))(half)
  want = jax.jit(lambda x: ours(x, "reference"))(full)
  for name, x, y, bound, times in zip(NAMES, got, want, bounds, (2, 3, 3, 3), strict=True):
    assert x.dtype == dtype
    error = float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y))
    assert error <= times * bound, (name, error, bound)


def test_jit_vmap_checkpoint_and_blocks_agree(monkeypatch):
  """The result does not depend on jit, vmap, checkpoint or the query block size."""
  from pallas_kernels.grouped_attention import xla

  config = DGAConfig(group_size=4, min_focal_tokens=0, selection="streaming")
  q, k, v, _ = arrays(0, 3, 70, 4, 2, 8)

  def op(q, k, v):
    return dynamic_group_attention(q, k, v, config=config, implementation="xla")

  want = jax.jit(op)(q, k, v)
  mapped = jax.jit(jax.vmap(lambda q, k, v: op(q[None], k[None], v[None])[0]))(q, k, v)
  np.testing.assert_allclose(mapped, want, atol=1e-6)
  monkeypatch.setattr(xla, "BLOCK_Q", 16)
  np.testing.assert_allclose(jax.jit(jax.checkpoint(op))(q, k, v), want, atol=1e-6)


def test_queries_without_visible_keys_give_zeros_and_finite_gradients():
  """Without complementary tokens the first queries of a document see no keys."""
  config = DGAConfig(group_size=4, importance_rate=0.0, min_focal_tokens=0, complementary=False)
  q, k, v, t = arrays(0, 1, 12, 2, 1, 4)
  for implementation in ("xla", "reference"):
    out, *gradients = run(q, k, v, t, config=config, implementation=implementation)
    np.testing.assert_array_equal(out[:, :3], 0)
    assert all(np.isfinite(x).all() for x in gradients)
    np.testing.assert_array_equal(gradients[0][:, :3], 0)


def test_nan_in_padding_changes_nothing():
  config = DGAConfig(group_size=4, min_focal_tokens=0)
  q, k, v, t = arrays(0, 2, 30, 2, 1, 4)
  lengths = np.array([30, 17], np.int32)
  token = (np.arange(30)[None] < lengths[:, None])[..., None, None]
  dirty = [jnp.where(token, x, jnp.nan) for x in (q, k, v)]
  for implementation in ("xla", "reference"):
    options = dict(config=config, implementation=implementation, lengths=lengths)
    for clean, got in zip(run(q, k, v, t, **options), run(*dirty, t, **options), strict=True):
      np.testing.assert_array_equal(clean, got)
      np.testing.assert_array_equal(got[1, 17:], 0)


def test_nan_in_one_row_does_not_reach_another_row():
  config = DGAConfig(group_size=4, min_focal_tokens=0)
  q, k, v, t = arrays(0, 2, 30, 2, 1, 4)
  out, *_ = run(q, k.at[0, 20].set(jnp.nan), v, t, config=config, implementation="xla")
  want, *_ = run(q, k, v, t, config=config, implementation="xla")
  np.testing.assert_array_equal(out[1], want[1])
  assert not np.isfinite(out[0]).all()


def test_temporary_memory_grows_linearly_with_length():
  """Temporary arrays hold one query block times r + k entries, and no L × L array."""
  from pallas_kernels.grouped_attention.xla import BLOCK_Q

  config = DGAConfig(selection="streaming")
  sizes = {}
  for L in (4096, 8192, 16384):
    x = jax.ShapeDtypeStruct((1, L, 1, 16), jnp.float32)

    def loss(q, k, v):
      return dynamic_group_attention(q, k, v, config=config).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    sizes[L] = compiled.memory_analysis().temp_size_in_bytes
    summaries = 3 * (L // config.block_size)
    assert sizes[L] < L * L * 4 / 4
    assert sizes[L] < 8 * 4 * BLOCK_Q * (summaries + BLOCK_Q + 18) + 40 * 4 * L * 16
  assert sizes[16384] < 2.2 * sizes[8192]
