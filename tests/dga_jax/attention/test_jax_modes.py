"""The op and its cache in modes of JAX that turn implicit conversions, NaN or leaks into errors."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from dga_jax import dynamic_group_attention, HeadBudgets, plan_groups, SinkWindow
from dga_jax.cache import attend_and_prefill, decode_step, empty_cache, extend
from dga_jax.config import DGAConfig
from tests.dga_jax.attention.cases import arrays, CONFIGS

B, L, H, N, D = 2, 16, 4, 2, 8
STREAMING = CONFIGS["streaming-window2-bias"]
NAMES = ["streaming-window2-bias", "global-exclusive-sinks", "random-sinks-bias"]
NAMES += ["bidirectional-global-sinks", "bidirectional-streaming-sinks-window"]


def whole_sequences(config, dtype=jnp.float32, **rows):
  """The output, and the gradients of the op."""
  *inputs, t = arrays(0, B, L, H, N, D, dtype)
  out, pull = jax.vjp(functools.partial(dynamic_group_attention, config=config, **rows), *inputs)
  return out, pull(t)


def cached_sequences(config, dtype=jnp.float32):
  """Outputs of prefill, a decode step and an extension, and an empty cache."""
  q, k, v, _ = arrays(0, B, L, H, N, D, dtype)
  call = functools.partial(attend_and_prefill, config=config, max_length=40)
  out, cache = call(q, k, v, lengths=[L, 5])
  token, cache = decode_step(q[:, 0], k[:, 0], v[:, 0], cache, config=config)
  more, cache = extend(q, k, v, cache, config=config, lengths=[3, L])
  empty = empty_cache(config=config, batch=B, max_length=9, num_kv_heads=N, head_dim=D, dtype=dtype)
  return (out, token, more), cache, empty


@contextlib.contextmanager
def strict(x64):
  with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
    yield


# TypePromotionError is raised while tracing, so that nothing needs to run.
@pytest.mark.parametrize("x64", [False, True], ids=["32 bits", "64 bits"])
class TestStrictDtypePromotion:
  @pytest.mark.parametrize("name", NAMES)
  @pytest.mark.parametrize("rows", ["whole", "packed"])
  def test_op_and_gradient(self, name, rows, x64):
    ids = {"segment_ids": np.repeat([[0, 1, 2, -1]], 4, axis=1).repeat(B, axis=0)}
    with strict(x64):
      jax.make_jaxpr(lambda: whole_sequences(CONFIGS[name], **(ids if rows == "packed" else {})))()

  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  def test_budgets_and_plan(self, dtype, x64):
    budgets = [
      HeadBudgets(("full", STREAMING), ((0, 1),)),
      HeadBudgets(("full", SinkWindow(window=4, sinks=2)), ((1, 0),)),
    ]
    q, k, *_ = arrays(0, B, L, H, N, D)
    with strict(x64):
      for one in budgets:
        jax.make_jaxpr(lambda config=one: whole_sequences(config, dtype, lengths=[L, 3]))()
      jax.make_jaxpr(lambda: plan_groups(q, k, config=CONFIGS["global"]))()
      jax.make_jaxpr(lambda: whole_sequences(STREAMING, implementation="reference"))()

  @pytest.mark.parametrize("name", NAMES[:2])
  @pytest.mark.parametrize("cache_dtype", [None, "int8"])
  def test_cache(self, name, cache_dtype, x64):
    changes = {"cache_dtype": cache_dtype}
    config = DGAConfig(**(vars(CONFIGS[name]) | changes))
    with strict(x64):
      jax.make_jaxpr(lambda: cached_sequences(config))()


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "TPU v5"])
def test_kernels_trace_under_strict_dtype_promotion(kind):
  """Of Mosaic GPU and Triton on an H100, and of Mosaic TPU."""
  platform, cores = ("gpu", 132) if "NVIDIA" in kind else ("tpu", 2)
  device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
  wide = functools.partial(arrays, 0, 1, 160, H, N, 64, jnp.bfloat16)

  def run(config):
    *inputs, t = wide()
    out, pull = jax.vjp(functools.partial(dynamic_group_attention, config=config), *inputs)
    _, cache = attend_and_prefill(*inputs, config=config, max_length=200)
    step, _ = decode_step(*(x[:, 0] for x in inputs), cache, config=config)
    return out, pull(t), step

  with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)), strict(x64=False):
    for name in ("streaming-sinks-window", "global"):
      jaxpr = jax.make_jaxpr(lambda config=CONFIGS[name]: run(config))()
      assert "pallas_call" in str(jaxpr)


def test_tracers_do_not_leak():
  with jax.checking_leaks():
    for name in NAMES[:2]:
      jax.make_jaxpr(lambda config=CONFIGS[name]: whole_sequences(config))()
      jax.make_jaxpr(lambda config=CONFIGS[name]: cached_sequences(config))()


@pytest.mark.parametrize("name", NAMES[:2])
def test_no_operation_returns_nan(name):
  """As `jax_debug_nans` without jit would check, in one compiled program."""

  *inputs, _ = arrays(0, B, L, H, N, D)

  def op(q, k, v):
    return dynamic_group_attention(q, k, v, config=CONFIGS[name], lengths=[7, 0])

  error, out = jax.jit(checkify.checkify(op, errors=checkify.nan_checks))(*inputs)
  error.throw()
  assert not out[1].any()
