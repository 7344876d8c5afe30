"""What the two importance kernels share: the sampled queries as rows, tiles, loads.

Letters: B batch, S sampled queries, R query heads to a KV head, N KV heads, L keys, D head dim,
E the head dim padded to a power of two, Q the S·R rows of a KV head padded to whole blocks, K a
tile of keys.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.grouped_attention.tile_spans import Span


@dataclasses.dataclass(frozen=True)
class ImportanceTile:
  """Rows × keys of one product, how many of them a program does, how Triton compiles it."""

  block_q: int
  block_k: int
  chunk_tiles: int
  num_warps: int
  num_stages: int

  @property
  def chunk(self) -> int:
    """Keys that one program goes through."""
    return self.chunk_tiles * self.block_k


def importance_tile(rows: int, head_dim: int, itemsize: int) -> ImportanceTile:
  """Tiles for the rows of a KV head, the head dim and an operand size in bytes.

  An operand tile takes at most 32 KiB, so that two keep to the 99 KiB of shared memory that any
  Ampere or newer GPU has.
  """
  if itemsize > 2:
    # Exact float32 products unroll into scalar code: small tiles keep its compile time down.
    return ImportanceTile(block_q=32, block_k=16, chunk_tiles=64, num_warps=8, num_stages=1)
  fits = max(16, min(128, 2**15 // (itemsize * padded_dim(head_dim))))
  block_q = min(fits, max(16, pl.next_power_of_2(rows)))
  return ImportanceTile(
    block_q=block_q,
    block_k=fits,
    chunk_tiles=1024 // fits,
    num_warps=8 if block_q * fits > 64 * 64 else 4,
    num_stages=2,
  )


def padded_dim(head_dim: int) -> int:
  """The power of two that a tile's columns take: tensor cores want 16 or more."""
  return max(16, pl.next_power_of_2(head_dim))


class Rows(NamedTuple):
  """The sampled queries of each KV head: arrays outside a kernel, references inside, or specs."""

  query: Any  # [B, N, Q, E]
  start: Any  # [B, Q] int32
  end: Any  # [B, Q] int32; rows that see nothing have the range [0, 0)
  span: Any  # [B, row blocks, 4] int32: the `Span` of keys that a block of rows sees


def make_rows(
  query_BxSxHxD: Array, start_BxS: Array, end_BxS: Array, kv_heads: int, block_q: int
) -> Rows:
  """Lays the queries out by KV head and pads them to whole blocks with rows that see nothing."""
  B, S, H, D = query_BxSxHxD.shape
  R = H // kv_heads
  query_BxNxSxRxD = query_BxSxHxD.reshape(B, S, kv_heads, R, D).transpose(0, 2, 1, 3, 4)
  query_BxNxQxD = query_BxNxSxRxD.reshape(B, kv_heads, S * R, D)
  short = -(S * R) % block_q
  pad = ((0, 0), (0, 0), (0, short), (0, padded_dim(D) - D))
  sees_BxS = start_BxS < end_BxS

  def by_row(bound_BxS: Array) -> Array:
    bound_BxS = jnp.where(sees_BxS, bound_BxS, 0).astype(jnp.int32)
    return jnp.pad(jnp.repeat(bound_BxS, R, axis=1), ((0, 0), (0, short)))

  start_BxQ, end_BxQ = by_row(start_BxS), by_row(end_BxS)
  start_BxTxq = start_BxQ.reshape(B, -1, block_q)
  end_BxTxq = end_BxQ.reshape(B, -1, block_q)
  nowhere = jnp.iinfo(jnp.int32).max
  first_BxTxq = jnp.where(start_BxTxq < end_BxTxq, start_BxTxq, nowhere)
  span = Span(
    first=first_BxTxq.min(axis=-1),
    full_first=start_BxTxq.max(axis=-1),
    full_last=end_BxTxq.min(axis=-1),
    last=end_BxTxq.max(axis=-1),
  )
  return Rows(jnp.pad(query_BxNxQxD, pad), start_BxQ, end_BxQ, jnp.stack(span, axis=-1))


def chunk_grid(
  rows: Rows, key_BxLxNxD: Array, tile: ImportanceTile
) -> tuple[tuple[int, ...], Rows, pl.BlockSpec]:
  """A grid of (block of rows, KV head, chunk of keys, batch), and the specs of rows and keys.

  Programs that read the same keys run next to each other. Each is given all keys of its head.
  """
  B, N, Q, E = rows.query.shape
  L = key_BxLxNxD.shape[1]
  grid = (Q // tile.block_q, N, pl.cdiv(L, tile.chunk), B)
  row = pl.BlockSpec((None, tile.block_q), lambda t, n, c, b: (b, t))
  specs = Rows(
    query=pl.BlockSpec((None, None, tile.block_q, E), lambda t, n, c, b: (b, n, t, 0)),
    start=row,
    end=row,
    span=pl.BlockSpec((None, None, 4), lambda t, n, c, b: (b, t, 0)),
  )
  return grid, specs, pl.BlockSpec((None, L, None, E), lambda t, n, c, b: (b, 0, n, 0))


def chunk_span(rows: Rows, length: int, tile: ImportanceTile) -> tuple[Array, Array, Span]:
  """First and last key of a program's chunk, and the `Span` of it that its rows see."""
  first_key = pl.program_id(2) * tile.chunk
  last_key = jnp.minimum(first_key + tile.chunk, length)
  first, full_first, full_last, last = (rows.span[i] for i in range(4))
  span = Span(
    first=jnp.maximum(first, first_key),
    full_first=jnp.maximum(full_first, first_key),
    full_last=jnp.minimum(full_last, last_key),
    last=jnp.minimum(last, last_key),
  )
  return first_key, last_key, span


def seen_mask(rows: Rows, first: Array, last_key: Array, block: int) -> Array:
  """[Q, block] bool: which keys from `first` on, and before `last_key`, each row sees."""
  key_1xK = (first + jnp.arange(block))[None]
  end_Q = jnp.minimum(rows.end[...], last_key)
  return (rows.start[...][:, None] <= key_1xK) & (key_1xK < end_Q[:, None])


def load_keys(
  key_ref: Any, first: Array | int, block: int, limit: Array | int | None, head_dim: int
) -> Array:
  """Keys [first, first + block) of a reference [keys, E] whose columns from head_dim on are none.

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
