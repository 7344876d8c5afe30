"""The Mosaic GPU kernels equal the oracle, interpreted and on a Hopper GPU."""

import functools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from pallas_kernels.grouped_attention.mosaic_gpu_attention import grouped_attention_mosaic_gpu
from tests.nightly import nightly
from tests.pallas_kernels.grouped_attention.gpu_cases import GPU_CASES
from tests.pallas_kernels.grouped_attention.kernel_cases import (
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

_COMMAND = "tests.pallas_kernels.grouped_attention.interpret_mosaic_gpu"
_gradients = functools.partial(output_and_gradients, grouped_attention_mosaic_gpu)


# Packed rows with two heads per work tile; shared bounds with one head per work tile; key tiles
# that all queries of a tile see, followed by a half one; tiles of queries without keys between
# others; heads that see all earlier tokens beside heads with few keys and a head without keys. A
# deadlock of the warpgroups ends in the time limit.
@pytest.mark.parametrize(
  "name",
  [
    *nightly("packed"),
    "streaming_packed",
    "without_groups",
    "full_tiles",
    "fully_masked_row",
    "full_heads",
  ],
)
def test_interpreted_kernels_equal_reference_without_races(name: str):
  result = subprocess.run(
    [sys.executable, "-m", _COMMAND, name],
    env=os.environ | {"NPROC": "16", "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert "RACE DETECTED" not in result.stdout


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lowers_for_h100(head_dim: int, dtype: str):
  args, options = structs_and_options(head_dim=head_dim, dtype=dtype)
  program = lower_for_h100(_gradients(options), *args)
  assert program.count("mosaic_gpu_v2") >= 5  # Forward, dq, and one dk/dv kernel for each source.


def test_a_source_without_keys_has_no_gradient_kernel():
  (query, sources, dout), options = structs_and_options(head_dim=64, dtype="bfloat16")
  none = jax.ShapeDtypeStruct((*sources.group.key.shape[:1], 0, 2, 64), "bfloat16")
  sources = sources._replace(group=sources.group._replace(key=none, value=none))
  program = lower_for_h100(_gradients(options), query, sources, dout)
  names = ("forward", "dq", "dkdv_focal", "dkdv_window")
  assert all(f"grouped_attention_{name}" in program for name in names)
  assert "grouped_attention_dkdv_group" not in program


def test_lowers_inside_a_shard_map_over_heads():
  sharded, args = lower_over_heads(grouped_attention_mosaic_gpu, abstract_mesh(2))
  lower_for_h100(sharded, *args, devices=2)


@needs_cuda_compiler
@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiles_for_h100(head_dim: int):
  args, options = structs_and_options(head_dim=head_dim, dtype="bfloat16")
  compile_for_h100(_gradients(options), *args)


@pytest.mark.parametrize(
  ("head_dim", "dtype", "changes", "message"),
  [
    (256, "bfloat16", {}, "head_dim is 256"),
    (64, "float32", {}, "dtype is float32"),
    (64, "bfloat16", {"scale": -1.0}, "scale is -1.0"),
  ],
)
def test_unsupported_calls_name_the_reason(
  head_dim: int, dtype: str, changes: dict[str, float], message: str
):
  args, options = structs_and_options(head_dim=head_dim, dtype=dtype)
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(_gradients(options | changes), *args)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n in GPU_CASES if n != "widest_head"])
def test_gpu_equals_reference(name: str):
  check_against_reference(grouped_attention_mosaic_gpu, GPU_CASES[name])


@pytest.mark.gpu
def test_gpu_results_repeat_bit_for_bit():
  query, sources, options = GPU_CASES["packed"].inputs()
  first, second = (
    values_and_gradients(grouped_attention_mosaic_gpu, query, sources, options) for _ in range(2)
  )
  for name, value in first.items():
    np.testing.assert_array_equal(value, second[name], err_msg=name)
