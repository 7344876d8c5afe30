"""The op compiled for four kinds of TPU without the hardware: it fits VMEM, and memory matches.

The expected peak memory is twice the arguments and results, because the kernels read a heads-first
copy of each, plus the summaries. The summaries count once in the forward pass and six times in the
backward pass, which holds their gradients and their parts before concatenation. On a chip with
128 MiB of VMEM, XLA keeps about 64 MiB of these arrays in VMEM.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dga_jax import DGAConfig, dynamic_group_attention
from dga_jax.model.attention_kinds.dense import DenseAttention
from tests.nightly import nightly
from tests.pallas_kernels.tpu import compile_for_tpu, TOPOLOGIES

pytestmark = pytest.mark.aot

H, N, D = 32, 8, 128
LENGTHS = {"8K": 2**13, "32K": 2**15, "128K": 2**17}
CHIPS_AND_LENGTHS = [
  *((chip, length) for length in ("8K", "128K") for chip in TOPOLOGIES),
  *nightly(*((chip, "32K") for chip in TOPOLOGIES)),
]
KEPT_IN_VMEM = {"v5e": 2**26, "v6e": 2**26}
STREAMING = DGAConfig(selection="streaming", min_focal_tokens=0)


def forward(config: DGAConfig) -> Callable[..., jax.Array]:
  def run(*arrays: jax.Array) -> jax.Array:
    return dynamic_group_attention(*arrays, config=config, implementation="mosaic_tpu")

  return run


def backward(config: DGAConfig) -> Callable[..., Any]:
  def run(query: jax.Array, key: jax.Array, value: jax.Array, dout: jax.Array) -> Any:
    out, pull = jax.vjp(forward(config), query, key, value)
    return out, pull(dout)

  return run


def tokens(L: int, heads: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
  return [jax.ShapeDtypeStruct((1, L, n, D), jnp.bfloat16) for n in heads]


def expected_peak(chip: str, L: int, heads: tuple[int, ...], results: int, summaries: int) -> int:
  """Expected peak memory in bytes. `results` is the number of heads in all results."""
  token = L * D * 2
  summary = (3 * L // 18) * D * 2 * 2 * N
  return 2 * token * (sum(heads) + results) + summaries * summary - KEPT_IN_VMEM.get(chip, 0)


def largest_array(compiled: jax.stages.Compiled) -> int:
  """The number of elements of the largest array in a program."""
  arrays = set(re.findall(r"\b([a-z]+\d*)\[([\d,]+)\]", compiled.as_text()))
  return max(
    math.prod(map(int, shape.split(",")))
    for dtype, shape in arrays
    # XLA copies an array in parts as s8[bytes]. The array itself also occurs in the program.
    if dtype != "s8" or "," in shape
  )


def check(compiled: jax.stages.Compiled, L: int, expected: int) -> None:
  assert largest_array(compiled) < L * L
  peak = compiled.memory_analysis().peak_memory_in_bytes
  assert abs(peak / expected - 1) < 0.1, f"peak is {peak}, expected {expected}"


@pytest.mark.parametrize(("chip", "length"), CHIPS_AND_LENGTHS)
def test_forward(chip: str, length: str):
  L, heads = LENGTHS[length], (H, N, N)
  compiled = compile_for_tpu(forward(STREAMING), *tokens(L, heads), chip=chip)
  check(compiled, L, expected_peak(chip, L, heads, results=H, summaries=1))
  assert "grouped_attention_forward" in kernels(compiled)


@pytest.mark.parametrize(("chip", "length"), CHIPS_AND_LENGTHS)
def test_backward(chip: str, length: str):
  L, heads = LENGTHS[length], (H, N, N, H)
  compiled = compile_for_tpu(backward(STREAMING), *tokens(L, heads), chip=chip)
  check(compiled, L, expected_peak(chip, L, heads, results=2 * H + 2 * N, summaries=6))
  backward_kernels = [name for name in kernels(compiled) if "transpose" in name]
  for part in ("dq", "dkdv_summaries", "dkdv_window"):
    assert any(f"grouped_attention_{part}" in name for name in backward_kernels)


@pytest.mark.parametrize(("length", "head_dim"), [(4096, 64), (4000, 128), (2048, 80)])
def test_dense_attention(length: int, head_dim: int):
  """SmolLM2's head size, a length that is padded, an odd head size: no array of all pairs."""
  shapes = [(1, length, heads, head_dim) for heads in (9, 3, 3, 9)]
  args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

  def gradients(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
    out, pull = jax.vjp(DenseAttention(), q, k, v)
    return out, pull(dout)

  compiled = compile_for_tpu(gradients, *args, chip="v5e")
  assert largest_array(compiled) < length * length
  for part in ("fwd", "dq", "dkv"):
    assert any(f"splash_mha_{part}" in name for name in kernels(compiled))


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_largest_array_finds_the_logits_of_dense_attention(chip: str):
  L = LENGTHS["8K"]
  for heads in (1, 8):
    compiled = compile_for_tpu(
      jax.nn.dot_product_attention, *tokens(L, (heads, heads, heads)), chip=chip
    )
    assert largest_array(compiled) >= L * L


def test_global_selection():
  L, heads = LENGTHS["32K"], (H, N, N, H)
  config = DGAConfig(selection="global", min_focal_tokens=0)
  compiled = compile_for_tpu(backward(config), *tokens(L, heads), chip="v5e")
  check(compiled, L, expected_peak("v5e", L, heads, results=2 * H + 2 * N, summaries=6))


@pytest.mark.parametrize(
  ("chip", "heads", "kv_heads", "head_dim", "dtype"),
  [
    ("v5e", 32, 32, 64, "bfloat16"),
    ("v5p", 16, 2, 256, "bfloat16"),
    ("v6e", 32, 1, 128, "bfloat16"),
    ("tpu7x", 16, 4, 256, "float32"),
  ],
)
def test_other_shapes_fit_vmem(chip: str, heads: int, kv_heads: int, head_dim: int, dtype: str):
  shapes = [(1, 4096, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
  args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  compiled = compile_for_tpu(backward(STREAMING), *args, chip=chip)
  assert any("grouped_attention_dkdv_window" in name for name in kernels(compiled))


def kernels(compiled: jax.stages.Compiled) -> list[str]:
  """The names of the kernels in a program."""
  return sorted(re.findall(r"%([a-z_0-9]+)[.\d]* = .*tpu_custom_call", compiled.as_text()))
