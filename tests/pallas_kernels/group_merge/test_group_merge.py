"""The backends of group merging equal the oracle, interpreted and on a GPU; they lower."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.group_merge import Entries, merge_blocks, merge_groups
from pallas_kernels.group_merge.mosaic_tpu_group_merge import (
  merge_blocks_mosaic_tpu,
  merge_groups_mosaic_tpu,
)
from pallas_kernels.group_merge.triton_group_merge import merge_blocks_triton, merge_groups_triton
from pallas_kernels.group_merge.xla import merge_blocks_xla, merge_groups_xla
from pallas_kernels.head_range import HeadRange
from pallas_kernels.mosaic_tpu_common import CHECKED
from tests.pallas_kernels.group_merge.reference import groups_reference, indices_of_blocks
from tests.pallas_kernels.h100 import compile_for_h100, lower_for_h100, needs_cuda_compiler
from tests.rounding import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes of one call: of `merge_groups` if `focal_per_block` is 0, else of `merge_blocks`."""

  length: int = 90
  query_heads: int = 4
  kv_heads: int = 2
  head_dim: int = 16
  members: int = 4
  focal_per_block: int = 0
  reorder: bool = True
  dtype: str = "float32"
  batch: int = 2
  contiguous: bool = False  # Blocks follow one another without gaps, from token `first` on.
  first: int = 0

  def arrays(self) -> list[jax.Array]:
    """Random query, key and value."""
    rng = np.random.default_rng(0)
    heads = (self.query_heads, self.kv_heads, self.kv_heads)
    shapes = [(self.batch, self.length, h, self.head_dim) for h in heads]
    return [jnp.asarray(rng.normal(size=shape), self.dtype) for shape in shapes]

  def index_arrays(self) -> tuple[jax.Array, ...]:
    """Indices of focal tokens, members and group queries, or block starts. Some are the index L."""
    rng = np.random.default_rng(1)
    L, m = self.length, self.members
    if self.focal_per_block:
      size = m + self.focal_per_block
      if self.contiguous:
        row = self.first + size * np.arange(max(0, L - self.first) // size)
        return (jnp.asarray(np.tile(row, (self.batch, 1)), jnp.int32),)
      start = np.arange(L // size) * size + rng.integers(0, 2, size=(self.batch, 1)) * (L % size)
      start[0, -1:] = L
      return (jnp.asarray(start, jnp.int32),)
    groups = (L - L // 5) // m
    shape = (self.batch, self.kv_heads)
    order = np.stack([rng.permutation(L) for _ in range(self.batch * self.kv_heads)])
    focal = np.sort(order[:, groups * m :]).reshape(*shape, -1)
    member = np.sort(order[:, : groups * m]).reshape(*shape, groups, m)
    focal[0, :, -1:], member[0, :, -1:] = L, L  # A shorter row.
    member[1:, 0, -1:, -1] = L  # An incomplete group.
    return tuple(jnp.asarray(x, jnp.int32) for x in (focal, member, member[..., -1]))

  def kernels(self, **options: Any) -> Any:
    """The Triton kernels as a function of query, key and value."""
    return self.bind(merge_blocks_triton, merge_groups_triton, **options)

  def tpu_kernels(self, **options: Any) -> Any:
    """The TPU kernels as a function of query, key and value."""
    return self.bind(merge_blocks_mosaic_tpu, merge_groups_mosaic_tpu, **options)

  def plain(self) -> Any:
    """The jax.numpy implementation as a function of query, key and value."""
    return self.bind(merge_blocks_xla, merge_groups_xla)

  def bind(self, blocks: Any, by_index: Any, **options: Any) -> Any:
    """One of two implementations as a function of query, key and value."""
    options["scale"] = 0.3
    if self.focal_per_block:
      options |= {"members": self.members, "focal": self.focal_per_block}
    else:
      options["reorder_window"] = self.reorder
    call = blocks if self.focal_per_block else by_index
    indices: tuple[Any, ...] = self.index_arrays()
    if self.contiguous:
      indices, options = (None,), options | {"first": self.first}
    return lambda q, k, v: call(q, k, v, *indices, **options)


CASES = {
  "reordered": Case(),
  "raw_window": Case(reorder=False),
  "one_query_head": Case(query_heads=2, members=3),
  "eight_query_heads": Case(query_heads=8, kv_heads=1, members=16),
  "odd_heads": Case(query_heads=6, members=7, length=71),
  "groups_of_one": Case(members=1, length=40),
  "blocks": Case(focal_per_block=1),
  "wide_blocks": Case(focal_per_block=3, members=18, length=100),
  "many_focal": Case(focal_per_block=9, members=2, query_heads=8, kv_heads=1),
  "after_sinks": Case(focal_per_block=2, length=97, contiguous=True, first=3),
  "only_sinks": Case(focal_per_block=2, length=3, contiguous=True, first=5),
  "no_groups": Case(length=3),
  "no_blocks": Case(length=3, focal_per_block=1),
  "half": Case(dtype="bfloat16"),
  "half_blocks": Case(dtype="float16", focal_per_block=2, members=5),
}
TPU_CASES = {
  "reordered": CASES["reordered"],
  "blocks": CASES["blocks"],
  "contiguous": Case(focal_per_block=2, length=97, dtype="bfloat16", contiguous=True),
  "after_sinks": CASES["after_sinks"],
}
GPU_CASES = {
  "global": Case(length=4000, head_dim=128, query_heads=8, members=16, dtype="bfloat16"),
  "streaming": Case(
    length=4001, head_dim=128, query_heads=8, members=16, focal_per_block=2, dtype="bfloat16"
  ),
  "wide_head": Case(length=1000, head_dim=256, members=16, dtype="float16"),
  "narrow_head": Case(length=1000, head_dim=64, members=30, focal_per_block=2, dtype="bfloat16"),
  "long_blocks": Case(length=1000, head_dim=64, members=120, focal_per_block=8, dtype="bfloat16"),
  "exact": Case(length=1000, head_dim=64, members=16),
}


NAMES = ("query", *Entries._fields)


def results(function: Any, arrays: Any, rows: list[int]) -> dict[str, np.ndarray]:
  """The first `rows` rows of each output, and gradients for random cotangents, by name."""

  def run(arrays: list[jax.Array]) -> Any:
    def cut(*arrays: jax.Array) -> Any:
      outputs, *chosen = function(*arrays)
      return [x[:, :size] for x, size in zip(outputs, rows, strict=True)], chosen

    outputs, pull, chosen = jax.vjp(cut, *arrays, has_aux=True)
    rng = np.random.default_rng(5)
    noise = [rng.normal(size=x.shape).astype(np.float32).astype(x.dtype) for x in outputs]
    return outputs, chosen, pull([jnp.asarray(x) for x in noise])

  outputs, chosen, grads = jax.jit(run)(arrays)
  named = dict(zip(NAMES, outputs, strict=True))
  named |= dict(zip(("dquery", "dkey", "dvalue"), grads, strict=True))
  named |= {"chosen": chosen[0]} if chosen else {}
  return {name: np.asarray(x).astype(np.float64) for name, x in named.items()}


def exact_results(case: Case, rows: list[int], chosen: np.ndarray | None) -> dict[str, np.ndarray]:
  """The results of the oracle in float64."""
  indices = [np.asarray(x) for x in case.index_arrays()]
  if chosen is not None:
    indices = indices_of_blocks(*indices, chosen, case.members, case.length)
  reorder = case.reorder and chosen is None

  def function(*arrays: jax.Array) -> Any:
    return (groups_reference(*arrays, *indices, scale=0.3, reorder_window=reorder),)

  arrays = [np.asarray(x) for x in case.arrays()]
  with jax.enable_x64(True):
    return results(function, [jnp.asarray(x, jnp.float64) for x in arrays], rows)


def check(case: Case, kernels: Any) -> None:
  """Checks values and gradients by the rule of `tests.rounding`, and copied rows for equality."""
  arrays = case.arrays()
  query, entries, *_ = jax.eval_shape(case.plain(), *arrays)
  rows = [x.shape[1] for x in (query, *entries)]

  def flat(function: Any) -> Any:
    def run(*arrays: jax.Array) -> Any:
      query, entries, *chosen = function(*arrays)
      return (query, *entries), *chosen

    return run

  with jax.default_matmul_precision("highest"):
    plain = results(flat(case.plain()), arrays, rows)
  exact = exact_results(case, rows, plain.get("chosen"))
  actual = results(flat(kernels), arrays, rows)
  # A gradient sums over query heads what depends on sums of logits, weights and cotangents.
  terms = max(case.head_dim, case.members, case.query_heads // case.kv_heads)
  for name, value in actual.items():
    if name == "chosen" or not name.startswith(("d", "group")):
      np.testing.assert_array_equal(value, plain[name], err_msg=name)  # Copied rows are exact.
      continue
    factor, sums = (3, 4) if name.startswith("d") else (2, 2)
    assert_close(
      value, exact[name], plain=plain[name], factor=factor, terms=terms, sums=sums, name=name
    )


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_equal_the_oracle(name: str):
  check(CASES[name], CASES[name].kernels(interpret=True))


@pytest.mark.parametrize("name", TPU_CASES)
def test_interpreted_tpu_kernels_equal_the_oracle(name: str):
  """Runs all kernels together. `test_mosaic_tpu.py` tests each kernel on more inputs."""
  check(TPU_CASES[name], TPU_CASES[name].tpu_kernels(interpret=CHECKED))


def test_without_focal_tokens_the_focal_rows_are_zero():
  case = Case(length=12, batch=1)
  member = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32).reshape(3, 4), (1, 2, 3, 4))
  indices = (jnp.zeros((1, 2, 0), jnp.int32), member, member[..., -1])
  options = {"scale": 0.3, "reorder_window": True}
  _, entries = merge_groups_triton(*case.arrays(), *indices, interpret=True, **options)
  tokens, at = ([np.asarray(x) for x in arrays] for arrays in (case.arrays(), indices))
  with jax.enable_x64(True):
    wide = [jnp.asarray(x, jnp.float64) for x in tokens]
    _, _, _, exact, *_ = groups_reference(*wide, *at, **options)
  assert not entries.focal_key.any()
  assert_close(entries.group_key[:, :3], exact, terms=case.head_dim)


def check_non_finite(dtype: str, **options: Any) -> None:
  """Checks that tokens with NaN or infinity change the entries of their own block alone."""
  case = Case(focal_per_block=1, members=4, length=60, kv_heads=1, dtype=dtype)
  query, key, value = case.arrays()
  key = key.at[0, 11].set(jnp.nan)
  value = value.at[1, 22].set(jnp.inf)
  clean = case.kernels(**options)(*case.arrays())[1]
  odd = case.kernels(**options)(query, key, value)[1]
  first = case.index_arrays()[0]
  for x, y in zip(clean[:4], odd[:4], strict=True):
    for row, position in ((0, 11), (1, 22)):
      block = int(np.searchsorted(np.asarray(first[row]), position, side="right")) - 1
      others = np.delete(np.arange(first.shape[1]), block)
      np.testing.assert_array_equal(x[row, others], y[row, others])
  assert np.isnan(odd.group_key[0]).any()
  assert np.isfinite(odd.group_value[0]).all()  # For the queries that do not see the group.
  assert not np.isfinite(odd.group_value[1]).all()


def test_non_finite_tokens_change_only_their_block():
  check_non_finite("float32", interpret=True)


def test_ties_select_the_earlier_token():
  arrays = [jnp.ones((1, 40, heads, 16)) for heads in (2, 1, 1)]
  start = jnp.arange(0, 40, 10, dtype=jnp.int32)[None]
  *_, chosen = merge_blocks_triton(*arrays, start, members=7, focal=3, scale=0.25, interpret=True)
  np.testing.assert_array_equal(chosen, np.broadcast_to([0, 1, 2], (1, 1, 4, 3)))


@pytest.mark.parametrize(
  ("name", "backend"),
  [("raw_window", "plain"), ("raw_window", "triton"), ("blocks", "triton"), ("blocks", "tpu")],
)
def test_a_range_of_heads_is_merged_in_place(name: str, backend: str):
  """Entries and gradients of two of four heads are those of arrays of these heads alone."""
  heads = HeadRange(1, 2)
  few = CASES[name]
  many = dataclasses.replace(few, query_heads=8, kv_heads=4)
  arrays = many.arrays()
  own = [heads.of(x, 4) for x in arrays]
  options = {
    "plain": {},
    "triton": {"interpret": True},
    "tpu": {"interpret": True},
  }[backend]
  functions = {
    "plain": (merge_blocks_xla, merge_groups_xla),
    "triton": (merge_blocks_triton, merge_groups_triton),
    "tpu": (merge_blocks_mosaic_tpu, merge_groups_mosaic_tpu),
  }[backend]

  def run(arrays: list[jax.Array], **options: Any) -> Any:
    def merge(*arrays: jax.Array) -> Any:
      query, entries, *_ = few.bind(*functions, **options)(*arrays)
      return query, entries

    (query, entries), pull = jax.vjp(merge, *arrays)
    d = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), entries)
    d = d._replace(window_key=2 * entries.window_key, window_value=3 * entries.window_value)
    return query, entries, pull((4 * query, d))

  query, entries, gradients = jax.jit(functools.partial(run, heads=heads, **options))(arrays)
  _, own_entries, own_gradients = jax.jit(functools.partial(run, **options))(own)
  np.testing.assert_array_equal(query, arrays[0])
  np.testing.assert_array_equal(entries.window_key, arrays[1])
  for got, wanted in zip(entries[:4], own_entries[:4], strict=True):
    np.testing.assert_array_equal(got, wanted)
  for x, got, wanted, factor in zip(arrays, gradients, own_gradients, (4, 2, 3), strict=True):
    inside = heads.of(got, 4)
    np.testing.assert_allclose(inside, wanted, rtol=1e-5, atol=1e-5)
    outside = factor * x
    ratio = x.shape[2] // 4
    keep = np.r_[0:ratio, 3 * ratio : 4 * ratio]
    np.testing.assert_allclose(got[:, :, keep], outside[:, :, keep], rtol=1e-6)


@pytest.mark.parametrize("name", ["reordered", "raw_window", "blocks"])
def test_lowers_for_h100(name: str):
  case = dataclasses.replace(CASES[name], head_dim=64, dtype="bfloat16")
  assert lower_for_h100(gradients(case), *structs(case)).count("group_merge") >= 2


@needs_cuda_compiler
@pytest.mark.parametrize("name", GPU_CASES)
def test_compiles_for_h100(name: str):
  case = GPU_CASES[name]
  compile_for_h100(gradients(case), *structs(case))


def gradients(case: Case) -> Any:
  """A function that runs all kernels, forward and backward."""

  def run(*arrays: jax.Array) -> Any:
    outputs, pull, _ = jax.vjp(
      lambda *arrays: (case.kernels()(*arrays)[:2], None), *arrays, has_aux=True
    )
    return pull(outputs)

  return run


def structs(case: Case) -> list[jax.ShapeDtypeStruct]:
  return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.arrays()]


def test_unsupported_calls_name_the_reason():
  case = Case(head_dim=24)
  call = functools.partial(merge_groups, scale=1.0, reorder_window=True)
  with pytest.raises(NotImplementedError, match="Ampere or newer"):
    call(*CASES["reordered"].arrays(), *case.index_arrays(), implementation="triton")
  with pytest.raises(ValueError, match="implementation is 'fast'"):
    call(*case.arrays(), *case.index_arrays(), implementation="fast")
  with pytest.raises(ValueError, match="reorder_window is True with heads=HeadRange"):
    call(*case.arrays(), *case.index_arrays(), heads=HeadRange(0, 1))
  # Without a name the call uses the backend that runs on any device.
  start = jnp.zeros((2, 1), jnp.int32)
  merge_blocks(*case.arrays(), start, members=4, focal=1, scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_equals_the_oracle(name: str):
  check(GPU_CASES[name], GPU_CASES[name].kernels())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu_non_finite_tokens_change_only_their_block(dtype: str):
  check_non_finite(dtype)
