"""`segmented_top_k` compiled for TPUs without the hardware."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.segmented_top_k import segmented_top_k, Segments
from tests.nightly import nightly
from tests.pallas_kernels.tpu import compile_for_tpu, TOPOLOGIES

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("length", [1000, *nightly(2**13), 2**15, *nightly(2**17), 2**19])
def test_compiles_without_a_sort(chip: str, length: int):
  of_segment = jax.ShapeDtypeStruct((1, 9), jnp.int32)
  scores = jax.ShapeDtypeStruct((1, 8, length), jnp.float32)
  select = functools.partial(segmented_top_k, implementation="mosaic_tpu")
  program = compile_for_tpu(select, scores, Segments(of_segment, of_segment, of_segment), chip=chip)
  assert " sort(" not in program.as_text()
