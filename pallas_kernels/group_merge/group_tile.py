"""How the kernels lay groups out: a tile of whole groups, flat, as one matrix of rows."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

_LEAST = 16  # of a side of a matrix product


class GroupTile(NamedTuple):
  """The tile of one program: G groups of `rows` rows each, in position order. Static.

  Letters: G groups, S groups rounded up to a power of two, T rows of the tile, likewise; M
  queries, one for each group and query head of the KV head, group by group, likewise.
  """

  groups: int
  rows: int
  heads: int

  @classmethod
  def of(cls, rows: int, heads: int, head_dim: int, elements: int) -> "GroupTile":
    """For groups of `rows` rows and `heads` query heads a KV head.

    `elements` of keys is what the kernel's registers hold; on an H100 more or less was slower.
    """
    return cls(max(1, elements // max(128, head_dim) // rows), rows, heads)

  @property
  def slots(self) -> int:
    """S: groups, rounded up."""
    return max(_LEAST, pl.next_power_of_2(self.groups))

  @property
  def width(self) -> int:
    """T: rows, rounded up."""
    return max(_LEAST, pl.next_power_of_2(self.groups * self.rows))

  @property
  def queries(self) -> int:
    """M: queries, rounded up."""
    return max(_LEAST, pl.next_power_of_2(self.groups * self.heads))

  @property
  def multiple(self) -> int:
    """What a number of groups is padded to: whole tiles, and eights for the attention kernels."""
    return self.groups * 8

  def indices(self, row_Bxnxkxm: Array, last_Bxnxk: Array, length: int) -> tuple[Array, Array]:
    """Rows [B, n, tiles, T] and queries [B, n, tiles, M] of every tile; `length` for none."""
    G, heads = self.groups, self.heads
    row = pad_index(row_Bxnxkxm, 2, self.multiple, length)
    last = pad_index(last_Bxnxk, 2, self.multiple, length)
    row = row.reshape(*row.shape[:2], -1, G * self.rows)
    last = jnp.repeat(last, heads, axis=-1).reshape(*last.shape[:2], -1, G * heads)
    return pad_index(row, 3, self.width, length), pad_index(last, 3, self.queries, length)

  def group_of_row(self) -> Array:
    """[T]; G and more for the rows that round up."""
    return jnp.arange(self.width) // self.rows

  def group_of_query(self) -> Array:
    """[M]; G and more for the queries that round up."""
    return jnp.arange(self.queries) // self.heads

  def weighs(self) -> Array:
    """[M, T] bool: whether a query and a row are of one group."""
    of_M, of_T = self.group_of_query(), self.group_of_row()
    return (of_M[:, None] == of_T[None]) & (of_M[:, None] < self.groups)

  def holds(self) -> Array:
    """[S, T] bool: whether a group holds a row."""
    of_S = jnp.arange(self.slots)
    return (of_S[:, None] == self.group_of_row()[None]) & (of_S[:, None] < self.groups)


def pad_index(index: Array, axis: int, multiple: int, length: int) -> Array:
  """The index array with `length`, which points nowhere, up to a multiple of entries, not 0."""
  widths = [(0, 0)] * index.ndim
  size = index.shape[axis]
  widths[axis] = (0, max(multiple - size, -size % multiple))
  return jnp.pad(index, widths, constant_values=length)


def block_softmax(logits_MxT: Array, mask_MxT: Array) -> Array:
  """Softmax of each query over the rows of its mask; zeros elsewhere."""
  logits_MxT = jnp.where(mask_MxT, logits_MxT, -1e30)
  weights_MxT = jnp.where(mask_MxT, jnp.exp(logits_MxT - logits_MxT.max(axis=1)[:, None]), 0.0)
  total_M = weights_MxT.sum(axis=1)
  weights_MxT /= jnp.where(total_M == 0, 1.0, total_M)[:, None]
  return jnp.where(mask_MxT, weights_MxT, 0.0)  # a sum that is NaN is its own group's alone
