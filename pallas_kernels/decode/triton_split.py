"""Attention of one query per head to entries of a cache that several Triton programs divide.

Letters: M query heads of a KV head, rounded up. T entries of a tile. P programs of a head.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode.triton_tile import add_tile, load_rows, OnlineSoftmax
from pallas_kernels.kernel_common import out_struct
from pallas_kernels.triton_common import dot, padded_slice


class Tile(NamedTuple):
  """How the entries of a cache are divided among programs.

  Attributes:
    entries: of a tile.
    slots: programs that run at the same time: two on each of an H100's 132 multiprocessors.
    most_splits: programs of one head at most. More of them take longer to combine.
    num_warps: of a program.
    num_stages: tiles in flight, plus one.
  """

  entries: int = 64
  slots: int = 264
  most_splits: int = 16
  num_warps: int = 4
  num_stages: int = 3

  def num_splits(self, heads: int, entries: int) -> int:
    """The number of programs among which each head's entries are divided.

    `heads` KV heads over all sequences in P programs each take ⌈heads·P / slots⌉ rounds, each of
    1/P of the entries. The smallest P with the least time is the best.
    """
    most = min(self.most_splits, max(1, pl.cdiv(entries, 2 * self.entries)))
    return min(range(1, most + 1), key=lambda P: (pl.cdiv(heads * P, self.slots) / P, P))


class Source(NamedTuple):
  """Entries that the programs of a head divide: references, and what the query sees of them."""

  key_ref: Any
  value_ref: Any
  key_scale_ref: Any
  value_scale_ref: Any
  end: Array  # entries from here on are not loaded
  is_visible: Callable[[Array], Array]
  bias: Callable[[Array], Array] | None = None


def attend_split(
  softmax: OnlineSoftmax,
  q_MxD: Array,
  sources: Sequence[Source],
  layer: Array,
  *,
  T: int,
  scale: float,
  split: Array,
  num_splits: int,
  tiles_before: int = 0,
) -> OnlineSoftmax:
  """Adds this program's part of the sources, a run of whole tiles.

  The tiles of all sources are one list, which the programs divide into runs of equal length.

  Args:
    softmax: over the entries so far.
    q_MxD: the queries.
    sources: the entries.
    layer: of the cache.
    T: entries of a tile.
    scale: of the logits.
    split: which part is this program's; none if it is negative.
    num_splits: the parts.
    tiles_before: tiles at the begin of the list that the caller reads itself.
  """
  tiles = [lax.div(source.end + (T - 1), T) for source in sources]
  total = functools.reduce(jnp.add, tiles) + tiles_before
  run = lax.div(total + (num_splits - 1), num_splits)
  begin = split * run - tiles_before
  end = begin + run
  for source, count in zip(sources, tiles, strict=True):
    step = functools.partial(_attend_step, q_MxD, source, layer, T, scale)
    softmax = lax.fori_loop(jnp.clip(begin, 0, count), jnp.clip(end, 0, count), step, softmax)
    begin, end = begin - count, end - count
  return softmax


def _attend_step(
  q_MxD: Array,
  source: Source,
  layer: Array,
  T: int,
  scale: float,
  number: Array,
  softmax: OnlineSoftmax,
) -> OnlineSoftmax:
  """Adds tile `number` of a source."""
  return _attend_tile(softmax, q_MxD, source, number * T, layer, T, scale)


def _attend_tile(
  softmax: OnlineSoftmax,
  q_MxD: Array,
  source: Source,
  first: Array,
  layer: Array,
  T: int,
  scale: float,
) -> OnlineSoftmax:
  """Adds the tile of a source that begins at entry `first`."""
  entry_T = first + jnp.arange(T)
  key_TxD, value_TxD = (
    load_rows(ref, (layer,), first, T, source.end).astype(q_MxD.dtype)
    for ref in (source.key_ref, source.value_ref)
  )
  logits_MxT = dot(q_MxD, key_TxD, trans_b=True)
  value_scale_T = None
  if source.key_scale_ref is not None:
    key_scale_T, value_scale_T = (
      plgpu.load(ref.at[layer, pl.ds(first, T)], mask=entry_T < source.end, other=0)
      for ref in (source.key_scale_ref, source.value_scale_ref)
    )
    logits_MxT *= key_scale_T[None]
  logits_MxT *= scale
  if source.bias is not None:
    logits_MxT += source.bias(entry_T)[None]
  logits_MxT = jnp.where(source.is_visible(entry_T)[None], logits_MxT, -jnp.inf)
  return add_tile(softmax, logits_MxT, value_TxD, value_scale_T)


def split_outputs(
  query: Array,
  kv_heads: int,
  splits: int,
  place: Callable[..., tuple[Any, Any, Any]] = lambda p, n, b: (p, n, b),
) -> tuple[list[pl.BlockSpec], list[jax.ShapeDtypeStruct]]:
  """The outputs acc, m and l of kernels whose programs each have a split of a KV head.

  Args:
    query: [B, H, D].
    kv_heads: N.
    splits: of a head at most.
    place: the coordinates of a program to its split, KV head and sequence; by default they are
      these three numbers.

  Returns:
    (the block of a program, the shape and dtype of the whole) of each, as `combine` takes them.
  """
  B, H, D = query.shape
  R = H // kv_heads
  specs, structs = [], []
  for row in ((D,), (), ()):

    def index(*grid: Any, row: tuple[int, ...] = row) -> tuple[Any, ...]:
      p, n, b = place(*grid)
      return (b, n, p, *[0] * len(row))

    specs.append(pl.BlockSpec((None, R, None, *row), index))
    structs.append(out_struct(query, (B, H, splits, *row), jnp.float32))
  return specs, structs


def store_split(softmax: OnlineSoftmax, refs: tuple[Any, Any, Any], heads: int) -> None:
  """Stores a program's softmax over its entries, of the `heads` query heads that exist."""
  M = softmax.m.shape[0]
  is_head_M, rows = jnp.arange(M) < heads, padded_slice(0, M)
  is_head_MxD = jnp.broadcast_to(is_head_M[:, None], softmax.acc.shape)
  acc_ref, m_ref, l_ref = refs
  plgpu.store(acc_ref.at[rows, :], softmax.acc, mask=is_head_MxD)
  plgpu.store(m_ref.at[rows], softmax.m, mask=is_head_M)
  plgpu.store(l_ref.at[rows], softmax.l, mask=is_head_M)
