"""The proof of the exit from Pallas-Triton: a kernel in Triton itself, through jax_triton."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_attention import grouped_attention
from pallas_kernels.grouped_attention.reference import grouped_attention_reference
from pallas_kernels.grouped_attention.xla import grouped_attention_xla
from tests.pallas_kernels.grouped_attention.kernel_cases import (
  GPU_CASES,
  relative_error,
  structs_and_options,
)
from tests.pallas_kernels.h100 import abstract_mesh

_INSTALLED = importlib.util.find_spec("jax_triton") is not None


@pytest.mark.skipif(_INSTALLED, reason="jax_triton is installed")
def test_says_that_it_is_not_installed():
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
  exact_query, exact_kv = jax.tree.map(lambda x: x.astype(jnp.float32), (query, sources.kv))
  with jax.default_matmul_precision("highest"):
    expected = np.asarray(
      grouped_attention_reference(exact_query, sources.with_kv(exact_kv), **options)
    )
    plain = np.asarray(grouped_attention_xla(query, sources, **options), np.float32)
  run = functools.partial(grouped_attention, implementation="jax_triton", **options)
  actual = np.asarray(jax.jit(run)(query, sources), np.float32)
  assert relative_error(actual, expected) <= 2 * relative_error(plain, expected)
  with pytest.raises(NotImplementedError, match="no backward pass"):
    jax.grad(lambda query: run(query, sources).astype(jnp.float32).sum())(query)
