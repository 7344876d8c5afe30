"""The importance of keys compiled for TPUs without the hardware: VMEM, and no array of logits."""

import functools

import jax
import pytest

from pallas_kernels.importance import mosaic_tpu_importance, sampled_importance
from tests.nightly import nightly
from tests.pallas_kernels.importance.test_importance import structs
from tests.pallas_kernels.tpu import compile_for_tpu, TOPOLOGIES

pytestmark = pytest.mark.aot

SAMPLES = 64


def compile_importance(chip: str, **sizes) -> jax.stages.Compiled:
  run = functools.partial(sampled_importance, implementation="mosaic_tpu")
  return compile_for_tpu(run, *structs(samples=SAMPLES, **sizes), chip=chip)


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("length", [2**15, *nightly(2**17)])
def test_holds_no_logits(chip: str, length: int):
  """Temporary arrays are the keys heads first, the queries and one number for each key."""
  sizes = {"heads": 32, "kv_heads": 8, "head_dim": 128}
  compiled = compile_importance(chip, length=length, **sizes)
  keys = 2 * length * 8 * 128 * 2
  assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * keys


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize(("head_dim", "dtype"), [(20, "bfloat16"), (256, "float32")])
def test_the_most_query_rows_fit_vmem(chip: str, head_dim: int, dtype: str):
  """`refusal` admits no more rows than every chip can hold, and one more group is refused."""
  heads = most_heads(head_dim, dtype)
  compile_importance(chip, length=4096, heads=heads, kv_heads=1, head_dim=head_dim, dtype=dtype)
  too_many = structs(
    length=4096, samples=SAMPLES, heads=heads + 8, kv_heads=1, head_dim=head_dim, dtype=dtype
  )
  assert "VMEM" in (mosaic_tpu_importance.refusal(*too_many) or "")


def most_heads(head_dim: int, dtype: str) -> int:
  """The most query heads of a KV head that the kernel admits, in steps of 8."""

  def admits(heads: int) -> bool:
    sizes = {"heads": heads, "kv_heads": 1, "head_dim": head_dim, "dtype": dtype}
    return mosaic_tpu_importance.refusal(*structs(length=4096, samples=SAMPLES, **sizes)) is None

  return max(heads for heads in range(8, 129, 8) if admits(heads))
