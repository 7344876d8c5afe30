"""The selection of an implementation, and the XLA implementation."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dga_jax import DGAConfig, dynamic_group_attention, explain, HeadBudgets, SinkWindow
from pallas_kernels.dispatch import find_target
from pallas_kernels.grouped_attention.xla import grouped_attention_xla
from tests.dga_jax.attention.cases import arrays
from tests.pallas_kernels.grouped_attention.kernel_cases import CASES, check_against_reference
from tests.pallas_kernels.h100 import abstract_mesh, lower_for_h100
from tests.pallas_kernels.tpu import lower_for_tpu

CONFIG = DGAConfig(min_focal_tokens=0)
SHAPE = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)
ARRAY = jnp.zeros((1, 32, 4, 64), jnp.bfloat16)


@pytest.mark.parametrize("name", ["packed", "streaming_packed", "fully_masked_row", "no_focal"])
def test_xla_equals_reference(name):
  check_against_reference(grouped_attention_xla, CASES[name])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="expects the reasons of a CPU")
def test_a_cpu_uses_xla_and_reports_why_not_the_others():
  choice = explain(ARRAY, ARRAY, ARRAY, config=CONFIG)["grouped_attention"]
  assert choice.runs == "xla"
  assert "Hopper" in choice.reason("mosaic_gpu")
  assert "cpu" in choice.reason("triton")
  with pytest.raises(NotImplementedError, match="triton: runs on an Ampere or newer GPU"):
    dynamic_group_attention(ARRAY, ARRAY, ARRAY, config=CONFIG, implementation="triton")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_gpu_targets_use_their_kernels():
  """The mesh determines the target device, not the default backend."""
  with jax.sharding.use_abstract_mesh(abstract_mesh()):
    choice = explain(SHAPE, SHAPE, SHAPE, config=CONFIG)["grouped_attention"]
    assert choice.runs == "mosaic_gpu"
    assert choice.reason("triton") is None
    assert find_target(ARRAY).capability == 9.0
  text = lower_for_h100(
    lambda q, k, v: dynamic_group_attention(q, k, v, config=CONFIG, implementation="mosaic_gpu"),
    *(SHAPE, SHAPE, SHAPE),
  )
  assert "mosaic_gpu" in text


def test_reasons_name_the_unsupported_value():
  odd = jax.ShapeDtypeStruct((1, 256, 4, 48), jnp.bfloat16)
  with jax.sharding.use_abstract_mesh(abstract_mesh()):
    choice = explain(odd, odd, odd, config=CONFIG)["grouped_attention"]
  assert "head_dim is 48" in choice.reason("mosaic_gpu")
  assert "head_dim is 48" in choice.reason("triton")
  assert choice.runs == "xla"


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_a_traced_scale_multiplies_the_queries():
  """Kernels take a static scale. The gradient of the scale is that of the XLA implementation."""
  streaming = DGAConfig(selection="streaming")
  budgets = HeadBudgets((streaming, SinkWindow(64)), ((0, 0, 1, 1),))
  scale = jax.ShapeDtypeStruct((), jnp.float32)

  def loss(scale, q, k, v, config):
    return dynamic_group_attention(q, k, v, config=config, scale=scale).astype(float).sum()

  gradient = jax.value_and_grad(loss, argnums=(0, 1))
  for config, lower, kernel in (
    (streaming, lower_for_tpu, "tpu_custom_call"),
    (budgets, lower_for_h100, "mosaic_gpu"),
  ):
    run = functools.partial(gradient, config=config)
    assert kernel in lower(run, scale, SHAPE, SHAPE, SHAPE)
  q, k, v, _ = arrays(0, 1, 40, 4, 2, 8)
  static = loss(0.4, q, k, v, streaming)
  value, (of_scale, _) = jax.jit(functools.partial(gradient, config=streaming))(0.4, q, k, v)
  above, below = (loss(scale, q, k, v, streaming) for scale in (0.41, 0.39))
  assert value == pytest.approx(float(static), rel=1e-4, abs=1e-4)
  assert of_scale == pytest.approx(float(above - below) / 0.02, rel=1e-2, abs=1e-2)
