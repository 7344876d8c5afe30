"""Importance of keys on a TPU: one kernel that reads the keys twice, without logits in memory.

The first pass over the keys of a KV head computes the logsumexp of each sampled query's logits, the
second the column sums of the softmax. Tiles of keys that no sampled query sees are not read.

Letters: B batch, S sampled queries, R query heads of a KV head, N KV heads, L keys, D head dim, Q
the S·R rows of a KV head padded to whole blocks, K a tile of keys, W the 128 lanes of a register.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from pallas_kernels.dispatch import refuse
from pallas_kernels.kernel_common import LOG2_E, MASK_VALUE, out_struct
from pallas_kernels.masks import in_range
from pallas_kernels.mosaic_tpu_common import dot, Interpret, LANES

_MAX_VMEM = 12 * 2**20  # bytes: every chip gives a kernel 16 MiB by default
_ROW_TILE = 16  # rows of a register tile of bfloat16


@dataclasses.dataclass(frozen=True)
class ImportanceBlocks:
  """Rows of one product, and keys of a tile: a multiple of 128."""

  block_q: int = 256
  block_k: int = 1024

  def for_call(self, rows: int, keys: int) -> "ImportanceBlocks":
    """No larger than the rows and the keys of a KV head."""
    return ImportanceBlocks(
      block_q=min(self.block_q, pl.cdiv(rows, _ROW_TILE) * _ROW_TILE),
      block_k=min(self.block_k, pl.cdiv(keys, LANES) * LANES),
    )

  def padded_rows(self, rows: int) -> int:
    """Q, the rows in whole blocks."""
    return pl.cdiv(rows, self.block_q) * self.block_q


def sampled_importance_mosaic_tpu(
  query_BxSxHxD: Float[Array, "B S H D"],
  key_BxLxNxD: Float[Array, "B L N D"],
  start_BxS: Int[Array, "B S"],
  end_BxS: Int[Array, "B S"],
  *,
  blocks: ImportanceBlocks | None = None,
  interpret: Interpret = False,
) -> Float[Array, "B N L"]:
  """See `sampled_importance`. `blocks` overrides the tile sizes, `interpret` runs on a CPU.

  Raises:
    NotImplementedError: for the reasons of `refusal`.
  """
  blocks = blocks or ImportanceBlocks()
  refuse(refusal(query_BxSxHxD, key_BxLxNxD, start_BxS, end_BxS, blocks=blocks))
  B, S, H, D = query_BxSxHxD.shape
  L, N = key_BxLxNxD.shape[1:3]
  R = H // N
  blocks = blocks.for_call(S * R, L)
  Q, tiles = blocks.padded_rows(S * R), pl.cdiv(L, blocks.block_k)
  padding = (0, Q - S * R)
  query_BxNxSxRxD = query_BxSxHxD.reshape(B, S, N, R, D).transpose(0, 2, 1, 3, 4)
  query_BxNxQxD = jnp.pad(
    query_BxNxSxRxD.reshape(B, N, S * R, D), ((0, 0), (0, 0), padding, (0, 0))
  )
  # The rows that pad a block see the keys [0, 0).
  bounds_BxSx2 = jnp.stack([start_BxS, end_BxS], axis=-1).astype(jnp.int32)
  bounds_BxQx2 = jnp.pad(jnp.repeat(bounds_BxSx2, R, axis=1), ((0, 0), padding, (0, 0)))

  def key_tile(b: Any, n: Any, step: Any, seen: Any) -> tuple[Any, ...]:
    last = jnp.maximum(seen[b, 1] - 1, 0)
    return b, n, jnp.clip(lax.rem(step, tiles), jnp.minimum(seen[b, 0], last), last), 0

  rows = pltpu.VMEM((Q, LANES), jnp.float32)
  sum_BxNx1xL = pl.pallas_call(
    functools.partial(_kernel, scale2=LOG2_E / math.sqrt(D), tiles=tiles, block_q=blocks.block_q),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, N, 2 * tiles),
      in_specs=[
        pl.BlockSpec((None, None, Q, D), lambda b, n, step, seen: (b, n, 0, 0)),
        pl.BlockSpec((None, Q, 2), lambda b, n, step, seen: (b, 0, 0)),
        pl.BlockSpec((None, None, blocks.block_k, D), key_tile),
      ],
      # The first pass writes no scores: its block is that of the second pass's first tile.
      out_specs=pl.BlockSpec(
        (None, None, 1, blocks.block_k),
        lambda b, n, step, seen: (b, n, 0, jnp.maximum(step - tiles, 0)),
      ),
      scratch_shapes=[rows, rows],
    ),
    out_shape=out_struct(key_BxLxNxD, (B, N, 1, L), jnp.float32),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    cost_estimate=pl.CostEstimate(
      flops=4 * B * N * Q * L * D,
      transcendentals=2 * B * N * Q * L,
      bytes_accessed=2 * key_BxLxNxD.size * key_BxLxNxD.dtype.itemsize + 4 * B * N * L,
    ),
    interpret=interpret,
    name="importance",
  )(
    _seen_tiles(start_BxS, end_BxS, blocks.block_k),
    query_BxNxQxD,
    bounds_BxQx2,
    key_BxLxNxD.swapaxes(1, 2),
  )
  count_BxL = in_range(L, start_BxS, end_BxS).sum(axis=1)
  return sum_BxNx1xL[:, :, 0] / jnp.maximum(1, count_BxL)[:, None].astype(jnp.float32)


def refusal(
  query: Array, key: Array, start: Array, end: Array, *, blocks: ImportanceBlocks | None = None
) -> str | None:
  """Why this kernel cannot run a call of `sampled_importance`; None if it can."""
  del start, end
  _, S, H, D = query.shape
  if key.dtype not in (jnp.bfloat16, jnp.float32):
    return f"dtype is {key.dtype}; it must be bfloat16 or float32"
  if D > 256:
    return f"head_dim is {D}; it must be at most 256"
  rows = S * (H // key.shape[2])
  needed = vmem_bytes(blocks or ImportanceBlocks(), rows, key.shape[1], D, key.dtype.itemsize)
  if needed > _MAX_VMEM:
    return (
      f"the {rows} sampled query rows of a KV head take {needed} bytes of VMEM; at most "
      f"{_MAX_VMEM} fit: sample fewer queries"
    )
  return None


def vmem_bytes(blocks: ImportanceBlocks, rows: int, keys: int, head_dim: int, itemsize: int) -> int:
  """VMEM of the kernel: blocks in two buffers, statistics, and the logits of one product.

  Rows of queries and keys take whole registers of 128 lanes, as do the two bounds of a row. A row
  of scores takes 8 sublanes.

  Args:
    blocks: before `for_call`.
    rows: S·R.
    keys: L.
    head_dim: D.
    itemsize: bytes of an element of queries and keys.
  """
  blocks = blocks.for_call(rows, keys)
  Q, K = blocks.padded_rows(rows), blocks.block_k
  columns = pl.cdiv(head_dim, LANES) * LANES
  buffers = (Q + K) * columns * itemsize + Q * LANES * 4 + 8 * K * 4
  statistics = 2 * Q * LANES * 4
  return 2 * buffers + statistics + 2 * blocks.block_q * K * 4


def _seen_tiles(start_BxS: Array, end_BxS: Array, block_k: int) -> Array:
  """int32 [B, 2]: the first tile with a seen key, and the end of the last; 0, 0 for no key."""
  sees_BxS = start_BxS < end_BxS
  last_B = jnp.where(sees_BxS, end_BxS, 0).max(axis=1)
  first_B = jnp.where(sees_BxS, start_BxS, last_B[:, None]).min(axis=1)
  tiles = jnp.stack([first_B // block_k, pl.cdiv(last_B, block_k)], axis=1)
  return tiles.astype(jnp.int32)


class _Tile(NamedTuple):
  """A tile of keys of a KV head, with all sampled rows of that head."""

  q_ref: Any
  bounds_ref: Any
  key_ref: Any
  first: Array  # position of the tile's first key
  block_q: int
  scale2: float

  def for_each_block(self, function: Callable[[Any], None]) -> None:
    """Calls a function with the slice of each block of rows."""

    @pl.loop(0, self.q_ref.shape[0] // self.block_q)
    def _(i: Array) -> None:
      function(pl.ds(i * self.block_q, self.block_q))

  def logits2(self, rows: Any) -> Array:
    """Base-2 logits [block_q, K], −∞ for keys that a row does not see."""
    bounds_Qx2 = self.bounds_ref[rows, :]
    key_1xK = self.first + lax.broadcasted_iota(jnp.int32, (1, self.key_ref.shape[0]), 1)
    sees_QxK = (bounds_Qx2[:, :1] <= key_1xK) & (key_1xK < bounds_Qx2[:, 1:])
    logits_QxK = dot(self.q_ref[rows, :], self.key_ref[...], (1, 1))
    return jnp.where(sees_QxK, logits_QxK * self.scale2, -jnp.inf)


def _kernel(
  seen_ref: Any,
  q_ref: Any,
  bounds_ref: Any,
  key_ref: Any,
  score_ref: Any,
  m_ref: Any,
  l_ref: Any,
  *,
  scale2: float,
  tiles: int,
  block_q: int,
) -> None:
  b, step = pl.program_id(0), pl.program_id(2)
  index = lax.rem(step, tiles)
  is_seen = (seen_ref[b, 0] <= index) & (index < seen_ref[b, 1])
  tile = _Tile(q_ref, bounds_ref, key_ref, index * key_ref.shape[0], block_q, scale2)

  @pl.when(step == 0)
  def _() -> None:
    m_ref[...] = jnp.full_like(m_ref, MASK_VALUE)
    l_ref[...] = jnp.zeros_like(l_ref)

  @pl.when(is_seen & (step < tiles))
  def _() -> None:
    tile.for_each_block(
      lambda rows: _add_logits(tile.logits2(rows), m_ref.at[rows], l_ref.at[rows])
    )

  @pl.when(step == tiles)
  def _() -> None:
    tile.for_each_block(lambda rows: _combine_lanes(m_ref.at[rows], l_ref.at[rows]))

  @pl.when(step >= tiles)
  def _() -> None:
    score_ref[...] = jnp.zeros_like(score_ref)

  @pl.when(is_seen & (step >= tiles))
  def _() -> None:
    def add_weights(rows: Any) -> None:
      p_QxK = jnp.exp2(tile.logits2(rows) - m_ref[rows, :1])
      score_ref[...] += p_QxK.sum(axis=0, keepdims=True)

    tile.for_each_block(add_weights)


def _add_logits(logits2_QxK: Array, m_ref: Any, l_ref: Any) -> None:
  """One step of an online logsumexp. Each lane has its own, so that no step sums over lanes."""
  parts = jnp.split(logits2_QxK, logits2_QxK.shape[1] // LANES, axis=1)
  old_QxW = m_ref[...]
  m_QxW = functools.reduce(jnp.maximum, parts, old_QxW)
  m_ref[...] = m_QxW
  alpha_QxW = jnp.exp2(old_QxW - m_QxW)
  l_ref[...] = l_ref[...] * alpha_QxW + sum(jnp.exp2(part - m_QxW) for part in parts)


def _combine_lanes(m_ref: Any, l_ref: Any) -> None:
  """Replaces the maxima of the lanes by the logsumexp of the row, in every lane."""
  m_Qx1 = m_ref[...].max(axis=1, keepdims=True)
  l_Qx1 = (l_ref[...] * jnp.exp2(m_ref[...] - m_Qx1)).sum(axis=1, keepdims=True)
  # The logits of a row that sees nothing are −∞, whose weights are 0 for any finite logsumexp.
  lse2_Qx1 = m_Qx1 + jnp.log2(jnp.where(l_Qx1 == 0, 1, l_Qx1))
  m_ref[...] = jnp.broadcast_to(lse2_Qx1, m_ref.shape)
