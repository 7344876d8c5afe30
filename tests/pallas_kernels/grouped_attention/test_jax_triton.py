"""The forward kernel in Triton through jax_triton, a replacement for Pallas-Triton."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.grouped_attention import grouped_attention
from pallas_kernels.grouped_attention.xla import grouped_attention_xla
from tests.pallas_kernels.grouped_attention.gpu_cases import GPU_CASES
from tests.pallas_kernels.grouped_attention.kernel_cases import (
  exact_values_and_gradients,
  structs_and_options,
)
from tests.pallas_kernels.h100 import abstract_mesh
from tests.rounding import assert_close

_INSTALLED = importlib.util.find_spec("jax_triton") is not None


@pytest.mark.skipif(_INSTALLED, reason="jax_triton is installed")
def test_missing_packages_are_named():
  (query, sources, _), options = structs_and_options(head_dim=64, dtype="bfloat16")
  run = functools.partial(grouped_attention, implementation="jax_triton", **options)

  with (
    jax.sharding.use_abstract_mesh(abstract_mesh()),
    pytest.raises(NotImplementedError, match=r"needs the package \w*triton, which"),
  ):
    jax.eval_shape(run, query, sources)


@pytest.mark.gpu
@pytest.mark.skipif(not _INSTALLED, reason="needs jax_triton")
@pytest.mark.parametrize("name", ["long", "ragged", "packed", "bias", "streaming", "widest_head"])
def test_gpu_equals_reference(name: str):
  query, sources, options = GPU_CASES[name].inputs()
  exact = exact_values_and_gradients(query, sources, options)["out"]
  with jax.default_matmul_precision("highest"):
    plain = grouped_attention_xla(query, sources, **options)
  run = functools.partial(grouped_attention, implementation="jax_triton", **options)
  actual = jax.jit(run)(query, sources)
  assert_close(actual, exact, plain=plain, terms=GPU_CASES[name].head_dim)
  with pytest.raises(NotImplementedError, match="no backward pass"):
    jax.grad(lambda query: run(query, sources).astype(jnp.float32).sum())(query)
