"""Block specs and spans of the Triton-lowered kernels that hold queries."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.grouped_attention.kv_sources import (
  KVSource,
  KVSourceRef,
  KVSources,
  KVSourcesRef,
)
from pallas_kernels.grouped_attention.tile_ranges import Span


def tile_span(source: KVSourceRef, block: int) -> Span:
  """The keys that a tile of `block` queries sees; ranges never decrease along the tile."""
  return Span(source.start[0], source.start[block - 1], source.end[0], source.end[block - 1])


def seen_mask(source: KVSourceRef, first: Array, block: int) -> Array:
  """[queries, block] bool: which of the keys [first, first + block) each query sees."""
  key_1xK = (first + jnp.arange(block))[None]
  return (source.start[...][:, None] <= key_1xK) & (key_1xK < source.end[...][:, None])


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
    """All keys and values of the KV head that a query head reads, and a tile of the ranges."""

    def kv(x: Array) -> Any:
      return pl.BlockSpec(
        (None, x.shape[1], None, self.head_dim),
        lambda h, t, b: (b, 0, h // self.heads_per_kv, 0),
      )

    def visible(x: Array) -> Any:
      shared = x.shape[1] == 1
      return pl.BlockSpec(
        (None, None, self.block_q),
        lambda h, t, b: (b, 0 if shared else h // self.heads_per_kv, self.blocks - 1 - t),
      )

    return KVSources(
      *(KVSource(kv(s.key), kv(s.value), visible(s.start), visible(s.end)) for s in sources)
    )
