"""What the Triton-lowered kernels share: block specs, loads, products."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.grouped_attention.kv_sources import (
  KVSource,
  KVSourceRef,
  KVSources,
  KVSourcesRef,
)
from pallas_kernels.grouped_attention.tile_ranges import Span


def tile_span(source: KVSourceRef, block: int) -> Span:
  """The entries that a tile of `block` queries sees; bounds never decrease along the tile."""
  return Span(source.start[0], source.start[block - 1], source.end[0], source.end[block - 1])


def load_rows(
  ref: Any, first: Array | int, block: int, limit: Array | int | None, *, head: Array | None = None
) -> Array:
  """Rows [first, first + block) of a reference [rows, D], or of one head of [rows, heads, D].

  Rows from `limit` on are zeros; None promises that there are none.
  """
  rows = pl.ds(first, block)
  part = ref.at[rows, :] if head is None else ref.at[rows, head, :]
  if limit is None:
    return part[...]
  keep = (first + jnp.arange(block) < limit)[:, None]
  return plgpu.load(part, mask=jnp.broadcast_to(keep, part.shape), other=0)


class QueryGrid(NamedTuple):
  """Block specs for a grid of (query head, tile of queries, batch).

  Tiles run from the last to the first: late queries see most, and long programs start first.
  """

  blocks: int
  block_q: int
  head_dim: int
  heads_per_kv: int

  def first_row(self) -> Array:
    """The first query of a program's tile."""
    return (self.blocks - 1 - pl.program_id(1)) * self.block_q

  def query(self) -> pl.BlockSpec:
    """A tile of one head of [B, L, H, D]."""
    return pl.BlockSpec(
      (None, self.block_q, None, self.head_dim),
      lambda h, t, b: (b, self.blocks - 1 - t, h, 0),
    )

  def row(self) -> pl.BlockSpec:
    """A tile of one head of [B, H, L]."""
    return pl.BlockSpec((None, None, self.block_q), lambda h, t, b: (b, h, self.blocks - 1 - t))

  def sources(self, sources: KVSources) -> KVSourcesRef:
    """All entries of the key/value head that a query head reads, and a tile of the bounds."""

    def entries(x: Array) -> Any:
      return pl.BlockSpec(
        (None, x.shape[1], None, self.head_dim),
        lambda h, t, b: (b, 0, h // self.heads_per_kv, 0),
      )

    def bound(x: Array) -> Any:
      shared = x.shape[1] == 1
      return pl.BlockSpec(
        (None, None, self.block_q),
        lambda h, t, b: (b, 0 if shared else h // self.heads_per_kv, self.blocks - 1 - t),
      )

    return KVSources(
      *(KVSource(entries(s.key), entries(s.value), bound(s.start), bound(s.end)) for s in sources)
    )


def seen_mask(source: KVSourceRef, first: Array, block: int) -> Array:
  """[queries, block] bool: which entries from `first` on each query of the tile sees."""
  entry_K = (first + jnp.arange(block))[None]
  return (source.start[...][:, None] <= entry_K) & (entry_K < source.end[...][:, None])
