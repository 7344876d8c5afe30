"""The Pallas-Triton kernels equal the oracle, interpreted and on a GPU."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from pallas_kernels.grouped_attention.block_sizes import TritonBlocks, TritonTile
from pallas_kernels.grouped_attention.triton_attention import grouped_attention_triton
from tests.nightly import nightly_except
from tests.pallas_kernels.grouped_attention.gpu_cases import GPU_CASES
from tests.pallas_kernels.grouped_attention.kernel_cases import (
  CASES,
  check_against_reference,
  lower_over_heads,
  output_and_gradients,
  structs_and_options,
  values_and_gradients,
)
from tests.pallas_kernels.h100 import (
  abstract_mesh,
  compile_for_h100,
  lower_for_h100,
  needs_cuda_compiler,
)

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

_SMALL = TritonTile(block_q=32, block_k=16, num_warps=4, num_stages=1)
_interpreted = functools.partial(
  grouped_attention_triton,
  blocks=TritonBlocks(forward=_SMALL, dq=_SMALL, dkdv=_SMALL),
  interpret=True,
)
_gradients = functools.partial(output_and_gradients, grouped_attention_triton)


@pytest.mark.parametrize(
  "name",
  nightly_except(
    CASES,
    "plain",
    "bias",
    "packed",
    "streaming_packed",
    "bidirectional",
    "wide_head",
    "widest_head",
  ),
)
def test_interpreted_kernels_equal_reference(name: str):
  check_against_reference(_interpreted, CASES[name])


def test_bfloat16_error_is_at_most_twice_that_of_xla():
  check_against_reference(_interpreted, dataclasses.replace(CASES["ragged"], dtype="bfloat16"))


def test_queries_without_visible_keys_give_zeros():
  query, sources, options = CASES["fully_masked_row"].inputs()
  results = values_and_gradients(_interpreted, query, sources, options)
  for name, value in results.items():
    assert not value[0].any(), name
    assert np.isfinite(value).all(), name


def test_gradients_of_invisible_entries_are_zero():
  query, sources, options = CASES["plain"].inputs()
  results = values_and_gradients(_interpreted, query, sources, options)
  for source in ("focal", "group", "window"):
    used = int(getattr(sources, source).end.max())
    for part in ("key", "value"):
      gradient = results[f"{source}_{part}"]
      assert gradient.shape[1] > used
      assert not gradient[:, used:].any()


@pytest.mark.parametrize(
  ("head_dim", "dtype"),
  nightly_except(
    itertools.product((16, 64, 128, 256), ("float16", "bfloat16", "float32")),
    (16, "float16"),
    (64, "bfloat16"),
    (128, "bfloat16"),
    (256, "float32"),
  ),
)
def test_lowers_for_h100(head_dim: int, dtype: str):
  args, options = structs_and_options(head_dim=head_dim, dtype=dtype)
  program = lower_for_h100(_gradients(options), *args)
  for name in ("forward", "dq", "dkdv"):
    assert f"grouped_attention_{name}" in program


def test_lowers_inside_a_shard_map_over_heads():
  sharded, args = lower_over_heads(grouped_attention_triton, abstract_mesh(2))
  lower_for_h100(sharded, *args, devices=2)


@needs_cuda_compiler
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_compiles_for_h100(head_dim: int):
  args, options = structs_and_options(head_dim=head_dim, dtype="bfloat16")
  compile_for_h100(_gradients(options), *args)


@pytest.mark.parametrize(
  ("head_dim", "dtype", "message"),
  [(80, "bfloat16", "head_dim is 80"), (64, "float64", "dtype is float64")],
)
def test_unsupported_calls_name_the_reason(head_dim: int, dtype: str, message: str):
  with jax.enable_x64(dtype == "float64"):
    args, options = structs_and_options(head_dim=head_dim, dtype=dtype)
    with pytest.raises(NotImplementedError, match=message):
      jax.eval_shape(_gradients(options), *args)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_equals_reference(name: str):
  check_against_reference(grouped_attention_triton, GPU_CASES[name])


@pytest.mark.gpu
def test_gpu_float32_equals_reference():
  case = dataclasses.replace(GPU_CASES["ragged"], dtype="float32")
  check_against_reference(grouped_attention_triton, case)


@pytest.mark.gpu
def test_gpu_results_repeat_bit_for_bit():
  query, sources, options = GPU_CASES["packed"].inputs()
  first, second = (
    values_and_gradients(grouped_attention_triton, query, sources, options) for _ in range(2)
  )
  for name, value in first.items():
    np.testing.assert_array_equal(value, second[name], err_msg=name)
