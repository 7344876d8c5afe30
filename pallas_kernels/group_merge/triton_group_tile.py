"""The tile of whole groups of the Triton-lowered kernels: one flat matrix of rows."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.kernel_common import MASK_VALUE

_MIN_SIDE = 16  # of a matrix product


class GroupTile(NamedTuple):
  """The tile of one program: G groups of `rows` rows each, in position order. Static.

  Letters: G groups; S groups, T rows of the tile and M queries, each rounded up to a power of
  two. There is one query for each group and query head of the KV head, group by group.
  """

  groups: int
  rows: int
  heads: int

  @classmethod
  def for_groups(cls, rows: int, heads: int, head_dim: int, elements: int) -> "GroupTile":
    """The tile for groups of `rows` rows and `heads` query heads of a KV head.

    Args:
      elements: keys times head dim of a tile; on an H100 more or fewer were slower.
    """
    return cls(max(1, elements // max(128, head_dim) // rows), rows, heads)

  @property
  def slots(self) -> int:
    """S: groups, rounded up."""
    return max(_MIN_SIDE, pl.next_power_of_2(self.groups))

  @property
  def width(self) -> int:
    """T: rows, rounded up."""
    return max(_MIN_SIDE, pl.next_power_of_2(self.groups * self.rows))

  @property
  def queries(self) -> int:
    """M: queries, rounded up."""
    return max(_MIN_SIDE, pl.next_power_of_2(self.groups * self.heads))

  @property
  def multiple(self) -> int:
    """Group counts are padded to a multiple of this: whole tiles, and eights for attention."""
    return self.groups * 8

  def indices(self, row_Bxnxkxm: Array, last_Bxnxk: Array, length: int) -> tuple[Array, Array]:
    """Rows [B, n, tiles, T] and queries [B, n, tiles, M] of each tile; `length` for none."""
    G, heads = self.groups, self.heads
    row = pad_index(row_Bxnxkxm, 2, self.multiple, length)
    last = pad_index(last_Bxnxk, 2, self.multiple, length)
    row = row.reshape(*row.shape[:2], -1, G * self.rows)
    last = jnp.repeat(last, heads, axis=-1).reshape(*last.shape[:2], -1, G * heads)
    return pad_index(row, 3, self.width, length), pad_index(last, 3, self.queries, length)

  def group_of_row(self) -> Array:
    """[T] int32; G or more for the rows that round up."""
    return jnp.arange(self.width) // self.rows

  def group_of_query(self) -> Array:
    """[M] int32; G or more for the queries that round up."""
    return jnp.arange(self.queries) // self.heads

  def weighs(self) -> Array:
    """[M, T] bool: whether a query and a row belong to the same group."""
    of_M, of_T = self.group_of_query(), self.group_of_row()
    return (of_M[:, None] == of_T[None]) & (of_M[:, None] < self.groups)

  def holds(self) -> Array:
    """[S, T] bool: whether a group holds a row."""
    of_S = jnp.arange(self.slots)
    return (of_S[:, None] == self.group_of_row()[None]) & (of_S[:, None] < self.groups)


def pad_index(index: Array, axis: int, multiple: int, length: int) -> Array:
  """Pads an axis with `length`, the index of no row, to a positive multiple of `multiple`."""
  widths = [(0, 0)] * index.ndim
  size = index.shape[axis]
  widths[axis] = (0, max(multiple - size, -size % multiple))
  return jnp.pad(index, widths, constant_values=length)


def group_softmax(logits_MxT: Array, mask_MxT: Array) -> Array:
  """Softmax of each query over the rows of its mask; zeros elsewhere, even if the sum is NaN."""
  logits_MxT = jnp.where(mask_MxT, logits_MxT, MASK_VALUE)
  weights_MxT = jnp.where(mask_MxT, jnp.exp(logits_MxT - logits_MxT.max(axis=1)[:, None]), 0.0)
  l_M = weights_MxT.sum(axis=1)
  weights_MxT /= jnp.where(l_M == 0, 1.0, l_M)[:, None]
  return jnp.where(mask_MxT, weights_MxT, 0.0)
