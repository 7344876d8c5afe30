"""`segmented_top_k` equals a sort in plain Python, for each implementation."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec

from pallas_kernels.mosaic_tpu_common import CHECKED
from pallas_kernels.segmented_top_k import segmented_top_k, Segments
from pallas_kernels.segmented_top_k.mosaic_tpu_top_k import segmented_top_k_mosaic_tpu
from pallas_kernels.segmented_top_k.triton_top_k import segmented_top_k_triton
from pallas_kernels.segmented_top_k.xla import segmented_top_k_xla
from tests.pallas_kernels.h100 import (
  abstract_mesh,
  compile_for_h100,
  lower_for_h100,
  needs_cuda_compiler,
)
from tests.pallas_kernels.tpu import abstract_mesh as tpu_mesh
from tests.pallas_kernels.tpu import lower_for_tpu

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

B, N, L, C = 2, 2, 41, 4

# With chunk=64 the kernel keeps a segment in registers and decides one bit per pass. With chunk=8
# it reads the segment from memory and decides two bits per pass.
IMPLEMENTATIONS = {
  "xla": jax.jit(segmented_top_k_xla),
  "registers": jax.jit(functools.partial(segmented_top_k_triton, chunk=64, interpret=True)),
  "chunks": jax.jit(functools.partial(segmented_top_k_triton, chunk=8, interpret=True)),
  "tpu": jax.jit(functools.partial(segmented_top_k_mosaic_tpu, interpret=True)),
}


def plain(scores, segments):
  """Sorts each segment in plain Python."""
  mask = np.zeros(scores.shape, bool)
  for b, n, c in np.ndindex(*scores.shape[:2], segments.start.shape[1]):
    start, length, quota = (int(x[b, c]) for x in segments)

    def order(i, row=scores[b, n]):
      return (np.isnan(row[i]), 0 if np.isnan(row[i]) else -row[i], i)

    mask[b, n, sorted(range(start, start + length), key=order)[:quota]] = True
  return mask


def check(scores, segments):
  want = plain(scores, segments)
  for name, select in IMPLEMENTATIONS.items():
    np.testing.assert_array_equal(select(jnp.asarray(scores), segments), want, err_msg=name)


@st.composite
def packed_segments(draw):
  """Draws up to C segments per row with gaps. Segments may be empty or shorter than the quota."""
  cuts = np.sort(draw(hnp.arrays(np.int32, (B, C + 1), elements=st.integers(0, L))), axis=1)
  present = draw(hnp.arrays(bool, (B, C)))
  quota = draw(hnp.arrays(np.int32, (B, C), elements=st.integers(0, L)))
  return Segments(cuts[:, :-1], np.where(present, np.diff(cuts, axis=1), 0).astype(np.int32), quota)


def scores_of(elements):
  return hnp.arrays(np.float32, (B, N, L), elements=elements)


# XLA flushes subnormals to zero on a CPU, but not on a GPU.
any_float = st.floats(width=32, allow_subnormal=False)
few_values = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, np.inf, -np.inf, np.nan, -np.nan])


@settings(max_examples=60)
@given(scores=scores_of(any_float) | scores_of(few_values), segments=packed_segments())
def test_equals_a_sort_of_each_segment(scores, segments):
  check(scores, segments)


@pytest.mark.parametrize("quota", [0, 1, 7, L - 1, L, L + 5])
def test_ties_select_the_earlier_position(quota):
  whole = Segments(*(np.full((B, C), x, np.int32) for x in (0, 0, quota)))
  whole.length[:, 0] = L
  check(np.full((B, N, L), 0.25, np.float32), whole)
  for select in IMPLEMENTATIONS.values():
    mask = select(jnp.full((B, N, L), 0.25), whole)
    np.testing.assert_array_equal(mask, np.broadcast_to(np.arange(L) < quota, (B, N, L)))


def test_scores_that_differ_in_the_last_bit_are_ordered():
  row = np.nextafter(np.float32(0.5), np.float32(1)) * np.ones(L, np.float32)
  row[::3] = 0.5
  segments = Segments(*(np.zeros((B, C), np.int32) for _ in range(3)))
  segments.length[:, 0], segments.quota[:, 0] = L, 30
  check(np.broadcast_to(row, (B, N, L)), segments)


@pytest.mark.parametrize("values", ["distinct", "few", "equal"])
def test_tpu_kernel_with_segments_over_several_tiles(values):
  """Segments begin and end inside tiles and span several; interpreted with checks."""
  rng = np.random.default_rng(1)
  scores = rng.normal(size=(B, N, 9001)).astype(np.float32)
  scores = {"distinct": scores, "few": np.round(scores), "equal": 0 * scores}[values]
  scores[0, 0, 5000:5005] = np.nan, -np.nan, np.inf, -np.inf, -0.0
  cuts = np.array([[7, 4000, 4100, 8999], [0, 9001, 9001, 9001]], np.int32)
  length = np.diff(cuts, axis=1)
  segments = Segments(cuts[:, :-1], length, (length + 9) // 10)
  kernel = jax.jit(functools.partial(segmented_top_k_mosaic_tpu, interpret=CHECKED))
  want = jax.jit(segmented_top_k_xla)(scores, segments)
  np.testing.assert_array_equal(kernel(scores, segments), want)


def test_vmap_over_calls():
  scores = jax.random.normal(jax.random.key(0), (3, B, N, L))
  segments = Segments(*(jnp.full((3, B, C), x, jnp.int32) for x in (0, 0, 9)))
  segments = segments._replace(length=segments.length.at[..., 1].set(L))
  kernel = functools.partial(segmented_top_k_triton, interpret=True)
  np.testing.assert_array_equal(
    jax.jit(jax.vmap(kernel))(scores, segments), jax.vmap(segmented_top_k_xla)(scores, segments)
  )


def structs(length=1000, segments=3):
  of_segment = jax.ShapeDtypeStruct((2, segments), jnp.int32)
  return jax.ShapeDtypeStruct((2, 4, length), jnp.float32), Segments(
    of_segment, of_segment, of_segment
  )


def test_the_target_device_selects_the_backend():
  assert "xla.gpu.triton" in lower_for_h100(segmented_top_k, *structs())
  assert "tpu_custom_call" in lower_for_tpu(segmented_top_k, *structs())
  assert "tpu_custom_call" not in lower_for_tpu(segmented_top_k, *structs(length=2**19 + 1))
  assert "stablehlo.sort" in jax.jit(segmented_top_k).lower(*structs()).as_text()


def test_an_unknown_implementation_is_an_error():
  with pytest.raises(ValueError, match="'sort'; for segmented_top_k it must be None"):
    segmented_top_k(
      jnp.zeros((1, 1, 4)), Segments(*[np.zeros((1, 1), int)] * 3), implementation="sort"
    )


def test_scores_of_another_dtype_are_an_error():
  scores, segments = structs()
  half = jax.ShapeDtypeStruct(scores.shape, jnp.float16)
  with pytest.raises(NotImplementedError, match="dtype is float16"):
    jax.eval_shape(segmented_top_k_triton, half, segments)


def test_lowers_inside_a_shard_map_over_heads():
  heads = PartitionSpec(None, "heads")
  sharded = jax.shard_map(
    segmented_top_k,
    mesh=abstract_mesh(2),
    in_specs=(heads, PartitionSpec()),
    out_specs=heads,
  )
  assert "xla.gpu.triton" in lower_for_h100(sharded, *structs(), devices=2)
  sharded = jax.shard_map(
    segmented_top_k, mesh=tpu_mesh(devices=2), in_specs=(heads, PartitionSpec()), out_specs=heads
  )
  assert "tpu_custom_call" in lower_for_tpu(sharded, *structs(), devices=2)


@needs_cuda_compiler
@pytest.mark.parametrize("length", [3, 1000, 32768, 131072])
def test_compiles_for_h100(length):
  compile_for_h100(segmented_top_k, *structs(length))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [3, 1000, 4096, 32768, 100_003])
@pytest.mark.parametrize("kind", ["distinct", "ties"])
def test_gpu_equals_the_sort(length, kind):
  rng = np.random.default_rng(length)
  scores = rng.normal(size=(2, 4, length)).astype(np.float32)
  if kind == "ties":
    scores = np.round(scores * 4) / 4
  cuts = np.sort(rng.integers(0, length + 1, (2, 4)), axis=1)
  size = np.diff(cuts, axis=1)
  segments = Segments(*(x.astype(np.int32) for x in (cuts[:, :-1], size, (size + 9) // 10)))
  got, want = (
    jax.jit(functools.partial(segmented_top_k, implementation=name))(scores, segments)
    for name in ("triton", "xla")
  )
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(got.sum(axis=-1)[:, 0], segments.quota.sum(axis=1))
