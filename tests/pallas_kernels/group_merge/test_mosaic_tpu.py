"""Each TPU kernel of group merging equals NumPy or jax.numpy, interpreted with checks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.group_merge import merge, merge_blocks, merge_groups
from pallas_kernels.group_merge.mosaic_tpu_merge import Groups, merge_rows
from pallas_kernels.group_merge.mosaic_tpu_merge_grad import merge_rows_grad
from pallas_kernels.group_merge.mosaic_tpu_row_gather import gather_rows, scatter_rows
from pallas_kernels.mosaic_tpu_common import CHECKED
from tests.pallas_kernels.group_merge.reference import merge_reference
from tests.pallas_kernels.tpu import abstract_mesh, lower_for_tpu
from tests.rounding import assert_close, assert_same

LENGTH, CHUNK = 2300, 512  # The positions of a row fill several chunks.


def indices(kind: str) -> np.ndarray:
  """Ascending indices [B, N, S]. The index LENGTH marks an empty slot."""
  rng = np.random.default_rng(0)
  shape, L = (1, 2), LENGTH

  def of_head(size: int, first: int, end: int) -> np.ndarray:
    return np.sort(first + rng.permutation(end - first)[:size])

  if kind == "few":
    index = np.stack([of_head(300, 0, L), of_head(300, 0, L)])
    index[0, 40:60] = L  # Empty slots between documents.
    index[1, 200:] = L  # A shorter row.
  elif kind == "crowded":  # All indices are in one chunk; the other chunks are empty.
    index = np.stack([of_head(200, 700, 1000), of_head(200, L - 200, L)])
  else:
    index = np.stack([of_head(2000, 0, L), of_head(2000, 0, L)])
    index[1, -600:] = L
  return index.reshape(*shape, -1).astype(np.int32)


def move(arrays: tuple[np.ndarray, ...], index: np.ndarray, length: int | None) -> Any:
  """Gathers rows by index in NumPy or, with a length, scatters rows to their positions."""
  out = []
  for x in arrays:
    heads = x.shape[1] // index.shape[1]
    rows = index.shape[-1] if length is None else length
    moved = np.zeros((*x.shape[:2], rows, x.shape[3]), np.float32)
    for b, h in np.ndindex(x.shape[:2]):
      index_S = index[b, h // heads]
      slot = np.flatnonzero(index_S < LENGTH)
      if length is None:
        moved[b, h, slot] = x[b, h, index_S[slot]]
      else:
        moved[b, h, index_S[slot]] = x[b, h, slot]
    out.append(moved)
  return out


@pytest.mark.parametrize(
  ("kind", "dtype", "odd"),
  [
    ("few", "float32", False),
    ("many", "bfloat16", False),
    ("crowded", "bfloat16", True),
  ],
)
def test_rows_are_moved_exactly(kind: str, dtype: str, odd: bool, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr("pallas_kernels.group_merge.mosaic_tpu_row_gather._MOST_CHUNK", CHUNK)
  index = indices(kind)
  rng = np.random.default_rng(1)
  S = index.shape[-1]

  def arrays(rows: int) -> tuple[jax.Array, ...]:
    made = [rng.normal(size=(1, heads, rows, 16)) for heads in (2, 4)]
    if odd:  # A non-finite value must stay in its row.
      made[0][0, 0, 3 % rows, 1], made[0][0, 1, rows - 1, 2], made[1][0, 2, 40 % rows] = (
        np.nan,
        np.inf,
        -np.inf,
      )
    return tuple(jnp.asarray(x, dtype) for x in made)

  for run, rows, length in (
    (gather_rows, LENGTH, None),
    (functools.partial(scatter_rows, length=LENGTH), S, LENGTH),
  ):
    x = arrays(rows)
    got = jax.jit(functools.partial(run, interpret=CHECKED))(x, index)
    want = move(tuple(np.asarray(a, np.float32) for a in x), index, length)
    for g, w in zip(got, want, strict=True):
      np.testing.assert_array_equal(np.asarray(g, np.float32), w)


CASES = {
  "blocks": Groups(37, 18, 2, 2, 16, 4, 0.3),
  "one_token": Groups(5, 1, 0, 1, 24, 4, 1.0),
  "half": Groups(20, 5, 1, 4, 32, 2, 0.3),
}


def operands(groups: Groups) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  k, dtype = groups.count, "bfloat16" if groups.itemsize == 2 else "float32"
  rows = k * groups.rows + 5  # Tokens after the last group.
  shapes = [(1, 2 * groups.heads, k), (1, 2, rows), (1, 2, rows)]
  return [jnp.asarray(rng.normal(size=(*s, groups.head_dim)) * 0.7, dtype) for s in shapes]


def plain(
  groups: Groups, slot: jax.Array | None, query: Any, key: Any, value: Any, merge: Any = merge
) -> list[Any]:
  """Merged and focal rows in jax.numpy, from the slots of the focal rows."""
  k, P, f, D = groups.count, groups.rows, groups.focal, groups.head_dim
  q = query.reshape(1, 2, groups.heads, k, D).transpose(0, 3, 1, 2, 4)
  rows = [x[:, :, : k * P].reshape(1, 2, k, P, D) for x in (key, value)]
  slots = jnp.full((1, 2, k, P), -1) if slot is None else slot.reshape(1, 2, -1, P)[:, :, :k]
  order = jnp.argsort(jnp.where(slots < 0, f + jnp.arange(P), slots), axis=-1)[..., None]
  rows = [jnp.take_along_axis(x, order, axis=3) for x in rows]
  merged = merge(q, *(x[..., f:, :].transpose(0, 2, 3, 1, 4) for x in rows), scale=groups.scale)
  focal = [x[..., :f, :].reshape(1, 2, k * f, D) for x in rows] if f else []
  return [*(x.transpose(0, 2, 1, 3) for x in merged), *focal]


@pytest.mark.parametrize("name", CASES)
def test_merged_groups_and_gradients_equal_the_oracle(name: str):
  """Checks values and gradients by the rule of `tests.rounding`."""
  groups = CASES[name]
  arrays = operands(groups)

  def run(arrays: list[jax.Array]) -> Any:
    merged = [*merge_rows(*arrays, groups, interpret=CHECKED)]
    slot = merged.pop() if groups.focal else None
    cotangents = [jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype) for x in merged]
    slots = [] if slot is None else [slot]
    grads = merge_rows_grad(tuple(arrays), slots, cotangents, groups, interpret=CHECKED)
    return merged, slot, cotangents, grads

  merged, slot, cotangents, grads = jax.jit(run)(arrays)

  def by_numpy(arrays: Any, slot: Any, cotangents: Any, merge: Any) -> Any:
    out, pull = jax.vjp(functools.partial(plain, groups, slot, merge=merge), *arrays)
    return out, pull([c.astype(x.dtype) for c, x in zip(cotangents, out, strict=True)])

  with jax.default_matmul_precision("highest"):
    same = jax.jit(functools.partial(by_numpy, merge=merge))(arrays, slot, cotangents)
  tokens, at, given = jax.tree.map(np.asarray, (arrays, slot, cotangents))
  with jax.enable_x64(True):
    wide = [jnp.asarray(x, jnp.float64) for x in tokens]
    exact = jax.jit(functools.partial(by_numpy, merge=_wide_merge))(wide, at, given)
  kernel_rows = groups.count * groups.rows
  terms = max(groups.head_dim, groups.rows)
  for factor, sums, got, want, near in zip(
    (2, 3), (2, 4), (merged, grads), exact, same, strict=True
  ):
    for g, w, n in zip(got, want, near, strict=True):
      g, w, n = (np.asarray(x)[:, :, :kernel_rows] for x in (g, w, n))
      assert_close(g, w, plain=n, factor=factor, terms=terms, sums=sums)


def _wide_merge(query: Any, key: Any, value: Any, *, scale: float) -> Any:
  """The oracle's merge in the layout of `pallas_kernels.group_merge.merge`."""
  key, value = (x.swapaxes(-3, -2) for x in (key, value))
  return merge_reference(query, key, value, scale)


def test_non_finite_tokens_change_only_their_group():
  groups = CASES["blocks"]
  query, key, value = operands(groups)
  run = jax.jit(functools.partial(merge_rows, groups=groups, interpret=CHECKED))
  clean = run(query, key, value)
  odd = run(
    query.at[0, 1, 30].set(jnp.nan),
    key.at[0, 0, 3 * 18 + 7].set(jnp.nan),
    value.at[0, 1, 20].set(jnp.inf),
  )
  hit = np.zeros((2, groups.count), bool)
  hit[0, [3, 30]], hit[1, 1] = True, True
  for x, y, rows in zip(clean[:4], odd[:4], (1, 1, 2, 2), strict=True):
    others = ~np.repeat(hit, rows, axis=1)
    # The kernel has a branch for non-finite inputs, which a CPU may compile to other roundings.
    terms = max(groups.head_dim, groups.rows)
    assert_same(np.asarray(x)[0][others], np.asarray(y)[0][others], terms=terms)
  assert np.isnan(odd[0][0, 0, [3, 30]]).all()
  assert np.isfinite(odd[1][0, 0]).all()  # For the queries that do not see the group.
  assert not np.isfinite(odd[1][0, 1, 1]).all()


def test_ties_select_the_earlier_token():
  groups = Groups(9, 12, 4, 1, 16, 4, 0.3)
  *_, slot = merge_rows(*(jnp.ones_like(x) for x in operands(groups)), groups, interpret=True)
  slot = np.asarray(slot).reshape(2, -1, 12)[:, : groups.count]
  np.testing.assert_array_equal(slot, np.broadcast_to([*range(4), *[-1] * 8], slot.shape))


def gradients(*arrays: Any) -> Any:
  """Gradients of `merge_groups` and `merge_blocks`, computed through the public functions."""
  query, key, value, focal, member, weighing, start = arrays

  def entries(*tokens: Any) -> Any:
    indices = (focal, member, weighing)
    return (
      merge_groups(*tokens, *indices, scale=0.3, reorder_window=True),
      merge_blocks(*tokens, start, members=4, focal=1, scale=0.3)[:2],
    )

  out, pull = jax.vjp(entries, query, key, value)
  return pull(out)


def structs(dtype: str) -> list[jax.ShapeDtypeStruct]:
  tokens = [jax.ShapeDtypeStruct((2, 90, heads, 16), dtype) for heads in (4, 2, 2)]
  shapes = [(2, 2, 18), (2, 2, 18, 4), (2, 2, 18), (2, 18)]
  return [*tokens, *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)]


def test_lowers_inside_a_shard_map_over_heads():
  tokens, heads = PartitionSpec(None, None, "heads"), PartitionSpec(None, "heads")
  sharded = jax.shard_map(
    gradients,
    mesh=abstract_mesh(devices=2),
    in_specs=(*[tokens] * 3, *[heads] * 3, PartitionSpec()),
    out_specs=(tokens,) * 3,
  )
  assert "group_merge_grad" in lower_for_tpu(sharded, *structs("bfloat16"), devices=2)


def test_tpu_targets_use_the_kernels():
  program = lower_for_tpu(gradients, *structs("bfloat16"))
  for name in ("gather_rows", "group_merge", "group_merge_grad", "scatter_rows"):
    assert f'kernel_name = "{name}"' in program
  assert "tpu_custom_call" not in lower_for_tpu(gradients, *structs("float16"))
  named = functools.partial(
    merge_groups, scale=1.0, reorder_window=True, implementation="mosaic_tpu"
  )
  with pytest.raises(NotImplementedError, match="mosaic_tpu: runs on a TPU"):
    jax.eval_shape(named, *structs("bfloat16")[:6])
  with (
    jax.sharding.use_abstract_mesh(abstract_mesh()),
    pytest.raises(NotImplementedError, match="dtype is float16"),
  ):
    jax.eval_shape(named, *structs("float16")[:6])
