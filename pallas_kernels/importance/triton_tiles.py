"""Rows, tiles and chunks of keys of the two importance kernels.

Letters: B batch, S sampled queries, R query heads of a KV head, N KV heads, L keys, D head dim,
E the head dim padded to a power of two, Q the S·R rows of a KV head padded to whole blocks, K a
tile of keys, C chunks of keys.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.grouped_attention.tile_ranges import Span


@dataclasses.dataclass(frozen=True)
class ImportanceTile:
  """Rows × keys of one product, tiles of a program, and how Triton compiles it."""

  block_q: int
  block_k: int
  chunk_tiles: int
  num_warps: int
  num_stages: int

  @property
  def chunk(self) -> int:
    """Keys of one program."""
    return self.chunk_tiles * self.block_k


# Each program of the second pass combines the results of all chunks of the first.
_MAX_CHUNKS = 64


def importance_tile(rows: int, keys: int, head_dim: int, itemsize: int) -> ImportanceTile:
  """Tiles for the rows and keys of a KV head, the head dim and an operand size in bytes.

  Up to a head dim of 512 an operand tile takes at most 16 KiB, so that the queries and three stages
  of keys fit the 99 KiB of shared memory of any Ampere or newer GPU. On an H200 tiles of 128 were
  slower.
  """
  least = pl.cdiv(keys, _MAX_CHUNKS)
  if itemsize > 2:
    # Exact float32 products unroll into scalar code: small tiles keep its compile time down.
    chunk_tiles = max(64, pl.cdiv(least, 16))
    return ImportanceTile(
      block_q=32, block_k=16, chunk_tiles=chunk_tiles, num_warps=8, num_stages=1
    )
  fits = max(16, min(64, 2**14 // (itemsize * padded_dim(head_dim))))
  block_q = min(fits, max(16, pl.next_power_of_2(rows)))
  return ImportanceTile(
    block_q=block_q,
    block_k=fits,
    chunk_tiles=max(1024 // fits, pl.cdiv(least, fits)),
    num_warps=4,
    num_stages=3,
  )


def padded_dim(head_dim: int) -> int:
  """The power of two of a tile's columns: tensor cores need 16 or more."""
  return max(16, pl.next_power_of_2(head_dim))


class Rows(NamedTuple):
  """The sampled queries of each KV head: arrays outside a kernel, references inside, or specs.

  Row s·R + r is head r of sampled query s.
  """

  query: Any  # [B, N, Q, E]
  start: Any  # [B, S] int32
  end: Any  # [B, S] int32


def make_rows(
  query_BxSxHxD: Array, start_BxS: Array, end_BxS: Array, kv_heads: int, block_q: int
) -> Rows:
  """Lays the queries out by KV head, padded to whole blocks and to a power of two of columns."""
  B, S, H, D = query_BxSxHxD.shape
  R = H // kv_heads
  query_BxNxSxRxD = query_BxSxHxD.reshape(B, S, kv_heads, R, D).transpose(0, 2, 1, 3, 4)
  query_BxNxQxD = query_BxNxSxRxD.reshape(B, kv_heads, S * R, D)
  pad = ((0, 0), (0, 0), (0, -(S * R) % block_q), (0, padded_dim(D) - D))
  return Rows(jnp.pad(query_BxNxQxD, pad), start_BxS, end_BxS)


def chunk_grid(
  rows: Rows, key_BxLxNxD: Array, tile: ImportanceTile
) -> tuple[tuple[int, ...], Rows, pl.BlockSpec]:
  """A grid of (block of rows, KV head, chunk of keys, batch), and the specs of rows and keys.

  Consecutive programs read the same keys. Each is given all keys of its KV head.
  """
  B, N, Q, E = rows.query.shape
  L, S = key_BxLxNxD.shape[1], rows.start.shape[1]
  grid = (Q // tile.block_q, N, pl.cdiv(L, tile.chunk), B)
  bound = pl.BlockSpec((None, S), lambda t, n, c, b: (b, 0))
  query = pl.BlockSpec((None, None, tile.block_q, E), lambda t, n, c, b: (b, n, t, 0))
  keys = pl.BlockSpec((None, L, None, E), lambda t, n, c, b: (b, 0, n, 0))
  return grid, Rows(query, bound, bound), keys


class Chunk(NamedTuple):
  """The keys [first, last) of a program, and the range of them that each of its rows sees."""

  first: Array
  last: Array
  start: Array  # [Q]
  end: Array  # [Q]

  @classmethod
  def for_program(cls, rows: Rows, length: int, heads_per_kv: int, tile: ImportanceTile) -> "Chunk":
    """The chunk of the running program; rows that pad a block see nothing."""
    first = pl.program_id(2) * tile.chunk
    last = jnp.minimum(first + tile.chunk, length)
    row_Q = pl.program_id(0) * tile.block_q + jnp.arange(tile.block_q)
    samples = rows.start.shape[0]
    sample_Q = jnp.minimum(lax.div(row_Q, heads_per_kv), samples - 1)
    end_Q = jnp.minimum(plgpu.load(rows.end.at[sample_Q]), last)
    return cls(
      first=first,
      last=last,
      start=jnp.maximum(plgpu.load(rows.start.at[sample_Q]), first),
      end=jnp.where(row_Q < samples * heads_per_kv, end_Q, first),
    )

  def span(self) -> Span:
    """The range of keys that any row sees, and the range that all see."""
    sees_Q = self.start < self.end
    return Span(
      first=jnp.where(sees_Q, self.start, self.last).min(),
      full_first=self.start.max(),
      full_last=self.end.min(),
      last=jnp.where(sees_Q, self.end, self.first).max(),
    )

  def seen(self, first: Array, block: int) -> Array:
    """[Q, block] bool: which of the keys [first, first + block) each row sees."""
    key_1xK = (first + jnp.arange(block))[None]
    return (self.start[:, None] <= key_1xK) & (key_1xK < self.end[:, None])


def load_keys(
  key_ref: Any, first: Array | int, block: int, limit: Array | int | None, head_dim: int
) -> Array:
  """Keys [first, first + block) of a reference [keys, E] with head_dim valid columns.

  Keys from `limit` on are zeros; None promises that there are none.
  """
  part = key_ref.at[pl.ds(first, block), :]
  keep = None
  if limit is not None:
    keep = jnp.broadcast_to((first + jnp.arange(block) < limit)[:, None], part.shape)
  if part.shape[1] != head_dim:
    inside = jnp.broadcast_to((jnp.arange(part.shape[1]) < head_dim)[None], part.shape)
    keep = inside if keep is None else keep & inside
  return part[...] if keep is None else plgpu.load(part, mask=keep, other=0)
