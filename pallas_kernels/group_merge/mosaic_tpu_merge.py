"""Forward kernel of group merging for TPUs: reads each key and value once.

Groups are consecutive rows. A program holds a tile of groups and processes it in parts of 16: one
small product has the logits of their queries and all their rows, of which each query uses its own
group's columns. Under streaming selection the rows are whole blocks, and the kernel first chooses
their focal rows. Weighing and picking rows are matrix products too.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kernel_common import MASK_VALUE, out_struct
from pallas_kernels.mosaic_tpu_common import dot, Interpret, LANES

PART = 16  # groups: whole tiles of any dtype for any group size
_TILE_BYTES = 2**18  # of keys


@dataclasses.dataclass(frozen=True)
class Groups:
  """The layout of groups. Static.

  Letters: S the 16 groups of a part, T their rows, F their focal rows, M their queries: one for
  each query head of the KV head and group, head by head.
  """

  count: int  # k
  rows: int  # of a group, focal ones included
  focal: int  # rows of a group that are chosen to stay focal
  heads: int  # R
  head_dim: int
  itemsize: int
  scale: float  # multiplies the merge logits

  @property
  def parts(self) -> int:
    """Parts of a tile."""
    row_bytes = max(LANES, self.head_dim) * self.itemsize
    fitting = max(1, _TILE_BYTES // (row_bytes * PART * self.rows))
    return min(fitting, pl.cdiv(self.count, PART))

  @property
  def tile(self) -> int:
    """Groups of a tile."""
    return PART * self.parts

  @property
  def tiles(self) -> int:
    """Tiles that hold all groups; the last one may reach beyond them."""
    return pl.cdiv(self.count, self.tile)

  def spec(self, rows: int) -> pl.BlockSpec:
    """A tile of an array [B, n, groups · rows, D] with `rows` rows for each group."""
    return pl.BlockSpec((None, None, self.tile * rows, self.head_dim), lambda b, n, t: (b, n, t, 0))

  def query_spec(self) -> pl.BlockSpec:
    """A tile of an array [B, H, groups, D]."""
    shape = (None, self.heads, self.tile, self.head_dim)
    return pl.BlockSpec(shape, lambda b, n, t: (b, n, t, 0))

  def slot_spec(self) -> pl.BlockSpec:
    """A tile of the array of slots, `slot_shape`."""
    shape = (None, None, None, self.parts, PART * self.rows)
    return pl.BlockSpec(shape, lambda b, n, t: (b, n, t, 0, 0))

  def slot_shape(self, batch: int, kv_heads: int) -> tuple[int, ...]:
    """[B, N, tiles, parts, rows]: the rank of a row among its group's focal rows, −1 for none."""
    return batch, kv_heads, self.tiles, self.parts, PART * self.rows

  def group_of_row(self) -> Array:
    """[1, T] int32."""
    return lax.broadcasted_iota(jnp.int32, (1, PART * self.rows), 1) // self.rows

  def weighs(self) -> Array:
    """[M, T] bool: whether a query and a row belong to the same group."""
    query_Mx1 = lax.broadcasted_iota(jnp.int32, (PART * self.heads, 1), 0)
    return query_Mx1 % PART == self.group_of_row()

  def holds(self) -> Array:
    """[S, T] bool: whether a group holds a row."""
    return lax.broadcasted_iota(jnp.int32, (PART, 1), 0) == self.group_of_row()

  def picks(self, slot_1xT: Array) -> Array:
    """[S·focal, T] bool: the focal rows, in order."""
    rank_1xT = jnp.where(slot_1xT >= 0, self.group_of_row() * self.focal + slot_1xT, -1)
    return lax.broadcasted_iota(jnp.int32, (PART * self.focal, 1), 0) == rank_1xT


def merge_rows(
  query: Array, key: Array, value: Array, groups: Groups, *, interpret: Interpret
) -> list[Array]:
  """Group keys and values [B, N, k, D]; with `groups.focal` also focal ones, and the slots.

  Args:
    query: [B, H, k, D], the query that weighs each group.
    key: [B, N, at least k·rows, D], group by group.
    value: as key.
    groups: their layout.
  """
  B, N, D = key.shape[0], key.shape[1], groups.head_dim
  counts = [1, 1] + [groups.focal] * (2 if groups.focal else 0)
  out_shape = [out_struct(key, (B, N, groups.count * count, D), key.dtype) for count in counts]
  out_specs = [groups.spec(count) for count in counts]
  if groups.focal:
    out_shape.append(out_struct(key, groups.slot_shape(B, N), jnp.int32))
    out_specs.append(groups.slot_spec())
  rows = B * N * groups.count * groups.rows
  merged: list[Array] = pl.pallas_call(
    functools.partial(_kernel, groups=groups),
    grid=(B, N, groups.tiles),
    in_specs=[groups.query_spec(), groups.spec(groups.rows), groups.spec(groups.rows)],
    out_specs=out_specs,
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
    cost_estimate=pl.CostEstimate(
      flops=2 * rows * D * PART * (groups.heads + 4 + 2 * groups.focal),
      bytes_accessed=rows * D * groups.itemsize * (2 + (2 + groups.heads) // groups.rows),
      transcendentals=rows * groups.heads * PART,
    ),
    interpret=interpret,
    name="group_merge",
  )(query, key, value)
  return merged


def _kernel(q_ref: Any, k_ref: Any, v_ref: Any, *out_refs: Any, groups: Groups) -> None:
  refs = (q_ref, k_ref, v_ref, out_refs)
  finite = [_part(i, *refs, groups, odd=False) for i in range(groups.parts)]

  # In a product, 0 · NaN would reach groups that do not hold the NaN: repeat with masks.
  @pl.when(~functools.reduce(jnp.logical_and, finite))
  def _() -> None:
    @pl.loop(0, groups.parts)
    def _(i: Array) -> None:
      _part(i, *refs, groups, odd=True)


def _part(
  i: Any, q_ref: Any, k_ref: Any, v_ref: Any, out_refs: Any, groups: Groups, *, odd: bool
) -> Array:
  """Writes the results of 16 groups; returns whether they are finite.

  Args:
    odd: whether to keep non-finite numbers within their group.
  """
  q_MxD = q_ref[:, pl.ds(pl.multiple_of(i * PART, PART), PART), :].reshape(-1, groups.head_dim)
  k_TxD, v_TxD = (part_of(ref, i, groups.rows)[...] for ref in (k_ref, v_ref))
  logits_MxT = dot(q_MxD, k_TxD, (1, 1))
  mask_MxT, holds_SxT = groups.weighs(), groups.holds()
  softmax = group_softmax if odd else finite_group_softmax
  take = _take_odd_rows if odd else dot
  if groups.focal:
    scores_MxT = softmax(logits_MxT * groups.head_dim**-0.5, mask_MxT)
    slot_1xT = _choose(scores_MxT.sum(axis=0, keepdims=True), holds_SxT, groups)
    out_refs[4][pl.ds(i, 1), :] = slot_1xT
    mask_MxT &= slot_1xT < 0
    picks_FxT = groups.picks(slot_1xT).astype(k_TxD.dtype)
    for x_TxD, out_ref in ((k_TxD, out_refs[2]), (v_TxD, out_refs[3])):
      picked_FxD = take(picks_FxT, x_TxD)
      part_of(out_ref, i, groups.focal)[...] = picked_FxD.astype(out_ref.dtype)
  weights_MxT = softmax(logits_MxT * groups.scale, mask_MxT)
  weights_1xT = weights_MxT.sum(axis=0, keepdims=True) * (1 / groups.heads)
  weights_SxT = jnp.where(holds_SxT, weights_1xT, 0.0)
  sums = []
  for x_TxD, out_ref in ((k_TxD, out_refs[0]), (v_TxD, out_refs[1])):
    if odd and x_TxD is v_TxD:  # NaN weights count as 0 in a value; see `xla.merge`.
      weights_SxT = jnp.where(weights_SxT == weights_SxT, weights_SxT, 0.0)
    merged_SxD = weighted(weights_SxT, x_TxD, take)
    part_of(out_ref, i, 1)[...] = merged_SxD.astype(out_ref.dtype)
    sums.append(merged_SxD)
  return ((sums[0] - sums[0]) + (sums[1] - sums[1])).sum() == 0


def part_of(ref: Any, i: Any, rows: int) -> Any:
  """The rows of part i in an array with `rows` rows for each group."""
  return ref.at[pl.ds(pl.multiple_of(i * (PART * rows), PART), PART * rows), :]


def group_softmax(logits_MxT: Array, mask_MxT: Array) -> Array:
  """Softmax of each query over the rows of its mask; zeros elsewhere, even if the sum is NaN."""
  logits_MxT = jnp.where(mask_MxT, logits_MxT, MASK_VALUE)
  m_Mx1 = logits_MxT.max(axis=1, keepdims=True)
  weights_MxT = jnp.where(mask_MxT, jnp.exp(logits_MxT - m_Mx1), 0.0)
  l_Mx1 = jnp.maximum(weights_MxT.sum(axis=1, keepdims=True), 1e-30)
  return jnp.where(mask_MxT, weights_MxT * (1 / l_Mx1), 0.0)


def finite_group_softmax(logits_MxT: Array, mask_MxT: Array) -> Array:
  """As `group_softmax` for finite logits, with fewer selects."""
  logits_MxT += jnp.where(mask_MxT, 0.0, MASK_VALUE)
  weights_MxT = jnp.exp(logits_MxT - logits_MxT.max(axis=1, keepdims=True))
  return weights_MxT * (1 / weights_MxT.sum(axis=1, keepdims=True))


def weighted(weights_SxT: Array, x_TxD: Array, take: Any = dot) -> Array:
  """weights @ x, exact to float32."""
  high_SxT = weights_SxT.astype(x_TxD.dtype)
  if x_TxD.dtype == jnp.float32:
    return take(high_SxT, x_TxD)
  low_SxT = (weights_SxT - high_SxT.astype(jnp.float32)).astype(x_TxD.dtype)
  S = weights_SxT.shape[0]
  both_2SxD = take(jnp.concatenate([high_SxT, low_SxT], axis=0), x_TxD)
  return both_2SxD[:S] + both_2SxD[S:]


def _choose(scores_1xT: Array, holds_SxT: Array, groups: Groups) -> Array:
  """[1, T]: the rank in position order among the chosen rows of its group, −1 for other rows."""
  row_1xT = lax.broadcasted_iota(jnp.int32, scores_1xT.shape, 1)
  # NaN is the largest score, as for a sort.
  scores_1xT = jnp.where(scores_1xT == scores_1xT, scores_1xT, jnp.inf)
  left_SxT = jnp.where(holds_SxT, scores_1xT, -1.0)
  before_SxT = jnp.zeros(holds_SxT.shape, jnp.int32)
  for _ in range(groups.focal):
    is_top_SxT = left_SxT == left_SxT.max(axis=1, keepdims=True)
    first_Sx1 = jnp.where(is_top_SxT, row_1xT, row_1xT.shape[1]).min(axis=1, keepdims=True)
    left_SxT = jnp.where(row_1xT == first_Sx1, -2.0, left_SxT)
    before_SxT += (first_Sx1 < row_1xT).astype(jnp.int32)
  slot_SxT = jnp.where(holds_SxT & (left_SxT == -2.0), before_SxT, -1)
  return slot_SxT.max(axis=0, keepdims=True)


def _take_odd_rows(weights_SxT: Array, x_TxD: Array) -> Array:
  """weights @ x, where a non-finite row reaches only results with a non-zero weight for it."""
  wide_TxD = x_TxD.astype(jnp.float32)
  finite_TxD = jnp.where(wide_TxD - wide_TxD == 0, wide_TxD, 0.0)
  out_SxD = dot(weights_SxT, finite_TxD.astype(x_TxD.dtype))
  weighs_SxT = (weights_SxT != 0).astype(jnp.bfloat16)
  for odd in (jnp.inf, -jnp.inf, jnp.nan):
    is_odd_TxD = wide_TxD != wide_TxD if odd != odd else wide_TxD == odd
    hits_SxD = dot(weighs_SxT, is_odd_TxD.astype(jnp.bfloat16))
    out_SxD += jnp.where(hits_SxD > 0, odd, 0.0)
  return out_SxD
