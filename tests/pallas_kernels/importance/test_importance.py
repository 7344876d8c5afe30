"""The importance of keys equals Eq. 16 and 17 in float64, interpreted and on a GPU."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.importance import sampled_importance
from pallas_kernels.importance.triton_importance import sampled_importance_triton
from pallas_kernels.importance.triton_tiles import ImportanceTile
from pallas_kernels.importance.xla import sampled_importance_xla
from tests.nightly import nightly_except
from tests.pallas_kernels.h100 import (
  abstract_mesh,
  compile_for_h100,
  lower_for_h100,
  needs_cuda_compiler,
)
from tests.rounding import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

_interpreted = functools.partial(
  sampled_importance_triton,
  tile=ImportanceTile(block_q=16, block_k=16, chunk_tiles=2, num_warps=4, num_stages=1),
  interpret=True,
)


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes of one call. `ranges` names the kind of ranges that the sampled queries see."""

  length: int
  samples: int = 8
  query_heads: int = 4
  kv_heads: int = 2
  head_dim: int = 16
  ranges: str = "causal"
  dtype: str = "float32"
  batch: int = 2

  def inputs(self, seed: int = 0) -> tuple[jax.Array, ...]:
    """Queries, keys, and the start and end of each query's range."""
    rng = np.random.default_rng(seed)
    B, L, S = self.batch, self.length, self.samples
    query = rng.normal(size=(B, S, self.query_heads, self.head_dim)) * 2
    key = rng.normal(size=(B, L, self.kv_heads, self.head_dim))
    recent = np.arange(max(L - S // 2, 0), L)
    position = np.stack([np.append(recent, rng.integers(0, L, S - len(recent))) for _ in range(B)])
    start, end = np.zeros((B, S), int), position + 1
    if self.ranges == "any":  # Includes empty ranges with end = start and with end < start.
      start, end = rng.integers(0, L + 1, (2, B, S))
    if self.ranges == "none":
      end = start
    if self.ranges == "one_document":  # A document in the middle of a packed row.
      start, end = start + L // 4, np.minimum(L // 4 + 1 + position, L * 3 // 5)
    return (
      *(jnp.asarray(x, self.dtype) for x in (query, key)),
      *(jnp.asarray(x, jnp.int32) for x in (start, end)),
    )


CASES = {
  "plain": Case(length=64),
  "ragged": Case(length=75),
  "shorter_than_a_tile": Case(length=9, samples=9),
  "one_key": Case(length=1, samples=1),
  "odd_sizes": Case(length=50, samples=7, query_heads=6, head_dim=20),
  "tiny_head": Case(length=40, head_dim=4),
  "one_head_each": Case(length=70, samples=5, query_heads=3, kv_heads=3),
  "any_ranges": Case(length=90, samples=13, ranges="any"),
  "nothing_seen": Case(length=40, ranges="none"),
  "one_document": Case(length=130, samples=12, ranges="one_document"),
}
GPU_CASES = {
  "long": Case(length=5000, samples=64, query_heads=32, kv_heads=8, head_dim=128, dtype="bfloat16"),
  "one_head_each": Case(
    length=3001, samples=64, query_heads=4, kv_heads=4, head_dim=64, dtype="float16"
  ),
  "odd_sizes": Case(
    length=1003, samples=37, query_heads=6, head_dim=80, ranges="any", dtype="bfloat16"
  ),
  "one_document": Case(
    length=4096, samples=64, query_heads=8, ranges="one_document", head_dim=128, dtype="bfloat16"
  ),
  "wide_head": Case(length=1500, samples=40, head_dim=256, dtype="bfloat16"),
  "widest_head": Case(length=700, samples=40, head_dim=512, dtype="float16"),
  "float32": Case(length=999, samples=20, head_dim=64),
}


def exact(query, key, start, end):
  """Eq. 16 and 17 of the paper in float64, one query at a time."""
  query, key = (np.asarray(x.astype(jnp.float32), np.float64) for x in (query, key))
  B, S, H, D = query.shape
  L, N = key.shape[1:3]
  scores, seen = np.zeros((B, N, L)), np.zeros((B, 1, L))
  for b, s in np.ndindex(B, S):
    part = slice(int(start[b, s]), int(end[b, s]))
    seen[b, 0, part] += 1
    for h in range(H if part.start < part.stop else 0):
      n = h // (H // N)
      logits = key[b, part, n] @ query[b, s, h] / np.sqrt(D)
      weights = np.exp(logits - logits.max())
      scores[b, n, part] += weights / weights.sum()
  return scores / np.maximum(seen, 1)


def check(kernel, case):
  """Checks a kernel by the rule of `tests.rounding`."""
  inputs = case.inputs()
  want = exact(*inputs)
  got = np.asarray(jax.jit(kernel)(*inputs))
  with jax.default_matmul_precision("highest"):
    plain = jax.jit(sampled_importance_xla)(*inputs)
  assert got.dtype == np.float32
  assert_close(got, want, plain=plain, **sums_of(case))
  np.testing.assert_array_equal(got[want == 0], 0)


def sums_of(case):
  """Arguments of `assert_close`: logits, weights and scores are sums of at most `terms` terms."""
  return {"terms": max(case.head_dim, case.length), "sums": 3}


@pytest.mark.parametrize("name", CASES)
def test_xla_equals_the_equation(name):
  inputs = CASES[name].inputs()
  with jax.default_matmul_precision("highest"):
    got = sampled_importance_xla(*inputs)
  assert_close(got, exact(*inputs), **sums_of(CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_equal_the_equation(name):
  check(_interpreted, CASES[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_error_is_at_most_twice_that_of_xla(dtype):
  check(_interpreted, dataclasses.replace(CASES["ragged"], dtype=dtype))


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_a_non_finite_key_changes_no_key_of_another_range(implementation):
  """Queries see keys from 20 on. Earlier keys, in the same tile, belong to another document."""
  run = jax.jit(_interpreted if implementation == "triton" else sampled_importance_xla)
  query, key, _, _ = CASES["plain"].inputs()
  start = jnp.full((2, 8), 20)
  end = jnp.broadcast_to(jnp.arange(40, 48), (2, 8))
  clean = run(query, key, start, end)
  unseen = np.array([3, 19, 48, 63])
  for bad in (np.nan, np.inf, -np.inf):
    np.testing.assert_array_equal(run(query, key.at[:, unseen].set(bad), start, end), clean)


def test_a_nan_key_gives_nan_in_the_same_scores_as_xla():
  query, key, start, end = CASES["plain"].inputs()
  key = key.at[0, 5, 0].set(np.nan)
  got, want = (jax.jit(f)(query, key, start, end) for f in (_interpreted, sampled_importance_xla))
  np.testing.assert_array_equal(jnp.isnan(got), jnp.isnan(want))
  assert jnp.isnan(got[0, 0]).any()
  assert not jnp.isnan(got[0, 1]).any()


def test_vmap_over_calls():
  inputs = [x[None] for x in CASES["plain"].inputs()]
  np.testing.assert_array_equal(
    jax.jit(jax.vmap(_interpreted))(*inputs)[0], jax.jit(_interpreted)(*(x[0] for x in inputs))
  )


def structs(*, length=1000, head_dim=64, dtype="bfloat16", samples=50, heads=4, kv_heads=2):
  shapes = [(2, samples, heads, head_dim), (2, length, kv_heads, head_dim)]
  bound = jax.ShapeDtypeStruct((2, samples), jnp.int32)
  return *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), bound, bound


@pytest.mark.parametrize(
  ("head_dim", "dtype"),
  nightly_except(
    itertools.product((16, 80, 128, 256), ("float16", "bfloat16", "float32")),
    (16, "float16"),
    (80, "bfloat16"),
    (128, "bfloat16"),
    (256, "float32"),
  ),
)
def test_h100_targets_use_the_kernels(head_dim, dtype):
  program = lower_for_h100(sampled_importance, *structs(head_dim=head_dim, dtype=dtype))
  assert "importance_logsumexp" in program
  assert "importance_scores" in program


def test_a_cpu_uses_xla():
  assert "importance_scores" not in jax.jit(sampled_importance).lower(*structs()).as_text()


def test_float64_uses_xla_and_the_kernel_refuses_it():
  with jax.enable_x64():
    args = structs(dtype="float64")
    assert "importance_scores" not in lower_for_h100(sampled_importance, *args)
    named = functools.partial(sampled_importance, implementation="triton")
    with (
      jax.sharding.use_abstract_mesh(abstract_mesh()),
      pytest.raises(NotImplementedError, match="dtype is float64"),
    ):
      jax.eval_shape(named, *args)


def test_an_unknown_implementation_is_an_error():
  with pytest.raises(ValueError, match="'cuda'; for sampled_importance it must be None"):
    sampled_importance(*CASES["one_key"].inputs(), implementation="cuda")


def test_lowers_inside_a_shard_map_over_heads():
  heads = PartitionSpec(None, None, "heads")
  sharded = jax.shard_map(
    sampled_importance,
    mesh=abstract_mesh(2),
    in_specs=(heads, heads, PartitionSpec(), PartitionSpec()),
    out_specs=PartitionSpec(None, "heads"),
  )
  assert "importance_scores" in lower_for_h100(sharded, *structs(), devices=2)


@needs_cuda_compiler
@pytest.mark.parametrize("head_dim", [20, 64, 128, 256, 512])
def test_compiles_for_h100(head_dim):
  compile_for_h100(sampled_importance, *structs(head_dim=head_dim))


@needs_cuda_compiler
def test_compiles_for_h100_in_float32():
  compile_for_h100(sampled_importance, *structs(dtype="float32"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_equals_the_equation(name):
  check(sampled_importance_triton, GPU_CASES[name])


@pytest.mark.gpu
def test_gpu_results_repeat_bit_for_bit():
  inputs = GPU_CASES["long"].inputs()
  first, second = (jax.jit(sampled_importance_triton)(*inputs) for _ in range(2))
  np.testing.assert_array_equal(first, second)
