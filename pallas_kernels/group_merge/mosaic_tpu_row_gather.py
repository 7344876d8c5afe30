"""Gather and scatter of rows by index on a TPU, as products with one-hot matrices.

A TPU copies whole tiles only. Indices ascend, so a tile of indices points into a short run of
chunks of the array, and there are at most (tiles + chunks − 1) pairs of a tile and a chunk. The
pairs, in order, are the steps of the grid; both blocks of a pair are known before the kernel runs.
Within a pair, a unit of indices is multiplied with the positions from its first to its last index.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kernel_common import out_struct
from pallas_kernels.mosaic_tpu_common import dot, Interpret, LANES

_UNITS = 4  # of a tile: products that do not depend on each other, and overlap
_CHUNK_BYTES, _MOST_CHUNK = 2**21, 2048
ALIGNED = 16  # positions: a run in a chunk begins at a multiple of it


class RowSizes(NamedTuple):
  """Static sizes of blocks and products of one call."""

  unit: int  # indices of a product
  run: int  # positions of a product
  tile: int  # indices of a block
  chunk: int  # positions of a block

  @classmethod
  def for_gather(cls, indices: int, length: int, row_bytes: int) -> "RowSizes":
    """Sizes of `gather_rows` for `indices` of `length` positions.

    Args:
      indices: S.
      length: L.
      row_bytes: bytes of a position in all arrays of a KV head, in whole lanes.
    """
    return cls._for_density(indices, length, row_bytes, least_unit=1)

  @classmethod
  def for_scatter(cls, indices: int, length: int, row_bytes: int) -> "RowSizes":
    """Sizes of `scatter_rows`; arguments as for `for_gather`."""
    return cls._for_density(indices, length, row_bytes, least_unit=LANES)

  @classmethod
  def _for_density(
    cls, indices: int, length: int, row_bytes: int, *, least_unit: int
  ) -> "RowSizes":
    """A unit points into about one run."""
    unit, run = (max(32, least_unit), 512) if 4 * indices < length else (LANES, 256)
    fitting = _CHUNK_BYTES // row_bytes // run * run
    chunk = max(run, min(_MOST_CHUNK, fitting, pl.cdiv(length, run) * run))
    return cls(unit, run, max(LANES, _UNITS * unit), chunk)


class _Pairs(NamedTuple):
  """Which tiles of indices and chunks of the array meet."""

  indices: Array  # [B, N, tiles, tile / 128, 128], −1 for none
  pairs: Array  # [B, N, steps]: tile · 2^16 + chunk; the sign bit marks a step without a pair
  spans: Array  # [B, N, units]: first · 2^16 + last position, both over ALIGNED


def gather_rows(
  arrays: tuple[Array, ...], index: Array, *, interpret: Interpret
) -> tuple[Array, ...]:
  """Rows [B, N·a, S, D] of arrays [B, N·a, L, D] by each head's index; zeros for L.

  Args:
    arrays: `a` heads for each of the N heads of the index.
    index: [B, N, S] int32, ascending except for L, which gives zeros.
  """
  S, L = index.shape[-1], arrays[0].shape[2]
  sizes = RowSizes.for_gather(S, L, _row_bytes(arrays, index))
  kernel = functools.partial(_gather_kernel, sizes=sizes)
  pairs = _make_pairs(index, L, sizes)
  blocks = _Blocks((sizes.chunk, _chunk_of), (sizes.tile, _tile_of))
  columns = pltpu.VMEM((sizes.tile, 1), jnp.int32)
  return _call(kernel, pairs, arrays, S, blocks, [columns], sizes, interpret)


def scatter_rows(
  arrays: tuple[Array, ...], index: Array, length: int, *, interpret: Interpret
) -> tuple[Array, ...]:
  """The inverse: rows [B, N·a, S, D] at their positions in arrays of zeros [B, N·a, length, D]."""
  sizes = RowSizes.for_scatter(index.shape[-1], length, _row_bytes(arrays, index))
  kernel = functools.partial(_scatter_kernel, sizes=sizes)
  pairs = _make_pairs(index, length, sizes)
  blocks = _Blocks((sizes.tile, _tile_of), (sizes.chunk, _chunk_of))
  return _call(kernel, pairs, arrays, length, blocks, [], sizes, interpret)


def _row_bytes(arrays: tuple[Array, ...], index: Array) -> int:
  heads = sum(x.shape[1] for x in arrays) // index.shape[1]
  return heads * max(LANES, arrays[0].shape[3]) * arrays[0].dtype.itemsize


def _make_pairs(index: Array, length: int, sizes: RowSizes) -> _Pairs:
  B, N, S = index.shape
  tiles, chunks = pl.cdiv(S, sizes.tile), pl.cdiv(length, sizes.chunk)
  index = jnp.where(index < length, index, -1)
  index = jnp.pad(index, ((0, 0), (0, 0), (0, tiles * sizes.tile - S)), constant_values=-1)
  first_BxNxu, last_BxNxu = _extremes(index, sizes.unit, length)
  spans = ((first_BxNxu // ALIGNED) << 16) | (last_BxNxu // ALIGNED)
  spans = jnp.where(last_BxNxu < 0, 1 << 16, spans)  # empty: the end precedes the start
  first, last = _extremes(index, sizes.tile, length)
  first, last = first // sizes.chunk, lax.cummax(jnp.maximum(last, 0), axis=2) // sizes.chunk
  # Every tile and every chunk is in a pair, so that every block is written.
  last = last.at[..., -1].set(chunks - 1)
  before = jnp.pad(last[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-1)
  first = jnp.minimum(jnp.minimum(first, before + 1), last)
  end = jnp.cumsum(last - first + 1, axis=-1)
  step = jnp.arange(tiles + chunks - 1, dtype=jnp.int32)[None, None]
  tile = (end[..., None, :] <= step[..., None]).sum(axis=-1, dtype=jnp.int32)
  idle = tile == tiles
  tile = jnp.minimum(tile, tiles - 1)
  chunk = jnp.take_along_axis(last - end, tile, axis=-1) + 1 + step
  pairs = (tile << 16) | jnp.where(idle, -(2**31) + chunks - 1, chunk)
  return _Pairs(index.reshape(B, N, tiles, -1, LANES), pairs, spans)


def _extremes(index: Array, size: int, length: int) -> tuple[Array, Array]:
  """The first and last position in each run of `size` indices; `length` and −1 for none."""
  index = index.reshape(*index.shape[:2], -1, size)
  return jnp.where(index < 0, length, index).min(axis=-1), index.max(axis=-1)


def _tile_of(pair: Array) -> Array:
  return (pair >> 16) & 0x7FFF


def _chunk_of(pair: Array) -> Array:
  return pair & 0xFFFF


class _Blocks(NamedTuple):
  """Rows of the blocks that are read and written, and the block of a pair."""

  read: tuple[int, Callable[[Array], Array]]
  written: tuple[int, Callable[[Array], Array]]


def _call(
  kernel: Any,
  pairs: _Pairs,
  arrays: tuple[Array, ...],
  out_rows: int,
  blocks: _Blocks,
  scratch: list[Any],
  sizes: RowSizes,
  interpret: Interpret,
) -> tuple[Array, ...]:
  B, N, steps = pairs.pairs.shape
  D, itemsize = arrays[0].shape[3], arrays[0].dtype.itemsize

  def spec(x: Any, rows: int, place: Callable[[Array], Array]) -> pl.BlockSpec:
    shape = (None, x.shape[1] // N, rows, D)
    return pl.BlockSpec(shape, lambda b, n, w, pairs, spans: (b, n, place(pairs[b, n, w]), 0))

  index_spec = pl.BlockSpec(
    (None, None, None, sizes.tile // LANES, LANES),
    lambda b, n, w, pairs, spans: (b, n, _tile_of(pairs[b, n, w]), 0, 0),
  )
  out_shape = [out_struct(x, (B, x.shape[1], out_rows, D), x.dtype) for x in arrays]
  heads = sum(x.shape[1] for x in arrays)
  products = pairs.spans.shape[-1] + steps
  moved = sum(x.size for x in arrays) + B * heads * out_rows * D
  out: tuple[Array, ...] = pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(B, N, steps),
      in_specs=[index_spec, *[spec(x, *blocks.read) for x in arrays]],
      out_specs=[spec(x, *blocks.written) for x in out_shape],
      scratch_shapes=[*scratch, pltpu.SMEM((1,), jnp.int32)],
    ),
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    cost_estimate=pl.CostEstimate(
      flops=2 * B * heads * products * sizes.unit * sizes.run * D,
      bytes_accessed=moved * itemsize,
      transcendentals=0,
    ),
    interpret=interpret,
    name=kernel.func.__name__.removeprefix("_").replace("kernel", "rows"),
  )(pairs.pairs, pairs.spans, pairs.indices, *arrays)
  return out


def _gather_kernel(
  pairs_ref: Any, spans_ref: Any, index_ref: Any, *refs: Any, sizes: RowSizes
) -> None:
  *array_refs, columns_ref, odd_ref = refs
  in_refs, out_refs = _halves(array_refs)
  step = _GridStep.current(pairs_ref, spans_ref, (_chunk_of, _tile_of), odd_ref, sizes)

  @pl.when(step.writes_new)
  def _() -> None:
    for ref in out_refs:
      ref[...] = jnp.zeros_like(ref)
    # The product needs the indices as a column.
    rows = index_ref.shape[0]
    padding = jnp.zeros((8 - rows, LANES), jnp.int32)
    columns = jnp.concatenate([index_ref[...], padding], axis=0).T
    for i in range(rows):
      columns_ref[pl.ds(i * LANES, LANES), :] = columns[:, i : i + 1]

  def move(unit: Any, start: Array, position: Array, odd: bool) -> None:
    at = pl.ds(unit * sizes.unit, sizes.unit)
    position_1xR = position + lax.broadcasted_iota(jnp.int32, (1, sizes.run), 1)
    _move(columns_ref[at, :] == position_1xR, in_refs, pl.ds(start, sizes.run), out_refs, at, odd)

  step.run(in_refs, move)


def _scatter_kernel(
  pairs_ref: Any, spans_ref: Any, index_ref: Any, *refs: Any, sizes: RowSizes
) -> None:
  *array_refs, odd_ref = refs
  in_refs, out_refs = _halves(array_refs)
  step = _GridStep.current(pairs_ref, spans_ref, (_tile_of, _chunk_of), odd_ref, sizes)

  @pl.when(step.writes_new)
  def _() -> None:
    for ref in out_refs:
      ref[...] = jnp.zeros_like(ref)

  def move(unit: Any, start: Array, position: Array, odd: bool) -> None:
    rows = pl.ds(unit * sizes.unit, sizes.unit)
    position_Rx1 = position + lax.broadcasted_iota(jnp.int32, (sizes.run, 1), 0)
    hits_RxU = position_Rx1 == index_ref[pl.ds(unit, 1), :]
    _move(hits_RxU, in_refs, rows, out_refs, pl.ds(start, sizes.run), odd)

  step.run(in_refs, move)


class _GridStep(NamedTuple):
  """One step of the grid: a tile of indices and a chunk of positions."""

  pair: Array
  reads_new: Array  # whether the block that is read differs from the one of the step before
  writes_new: Array
  span_of: Callable[[Any], Array]  # of a unit of the tile
  odd_ref: Any  # whether the block that is read holds a non-finite number
  sizes: RowSizes

  @classmethod
  def current(
    cls,
    pairs_ref: Any,
    spans_ref: Any,
    blocks: tuple[Callable[[Array], Array], Callable[[Array], Array]],
    odd_ref: Any,
    sizes: RowSizes,
  ) -> "_GridStep":
    """The running step. `blocks` gives the block that is read, and the one that is written."""
    b, n, step = (pl.program_id(i) for i in range(3))
    pair = pairs_ref[b, n, step]
    previous = pairs_ref[b, n, jnp.maximum(step - 1, 0)]
    reads_new, writes_new = ((step == 0) | (of(previous) != of(pair)) for of in blocks)
    first_unit = _tile_of(pair) * (sizes.tile // sizes.unit)
    span_of = lambda unit: spans_ref[b, n, first_unit + unit]  # noqa: E731
    return cls(pair, reads_new, writes_new, span_of, odd_ref, sizes)

  def run(self, in_refs: Any, move: Callable[[Any, Array, Array, bool], None]) -> None:
    """Calls move(unit, start in the chunk, its position, odd) for every run of every unit."""

    @pl.when(self.reads_new)
    def _() -> None:
      odd = [_has_odd(ref[a]) for ref in in_refs for a in range(ref.shape[0])]
      self.odd_ref[0] = functools.reduce(jnp.logical_or, odd).astype(jnp.int32)

    chunk, run = self.sizes.chunk, self.sizes.run
    begin = _chunk_of(self.pair) * chunk
    units = self.sizes.tile // self.sizes.unit
    odd = self.odd_ref[0] != 0

    def move_run(unit: Any, i: Array | int, odd: bool) -> None:
      low, _ = self._range(unit, begin)
      start = pl.multiple_of(jnp.minimum(low + i * run, chunk - run), ALIGNED)
      move(unit, start, begin + start, odd)

    def runs(unit: Any) -> Array:
      low, end = self._range(unit, begin)
      return (end - low + (run - 1)) // run

    @pl.when((self.pair >= 0) & ~odd)
    def _() -> None:
      # The first runs of all units have no branch, so that they overlap.
      for unit in range(units):
        move_run(unit, 0, odd=False)
      for unit in range(units):
        pl.loop(1, runs(unit))(functools.partial(move_run, unit, odd=False))

    @pl.when((self.pair >= 0) & odd)
    def _() -> None:
      @pl.loop(0, units)
      def _(unit: Array) -> None:
        pl.loop(0, runs(unit))(functools.partial(move_run, unit, odd=True))

  def _range(self, unit: Any, begin: Array) -> tuple[Array, Array]:
    """The range of the chunk that a unit points into."""
    span = self.span_of(unit)
    low = jnp.maximum((span >> 16) * ALIGNED - begin, 0)
    return low, jnp.minimum(((span & 0xFFFF) + 1) * ALIGNED - begin, self.sizes.chunk)


def _halves(refs: list[Any]) -> tuple[list[Any], list[Any]]:
  return refs[: len(refs) // 2], refs[len(refs) // 2 :]


def _has_odd(x: Array) -> Array:
  """Whether a number is not finite, or a sum overflows float32."""
  ones = jnp.ones((8, x.shape[0]), x.dtype)
  sums = dot(ones, x)
  return ~((sums - sums).sum() == 0)


def _move(hits: Array, in_refs: Any, rows: Any, out_refs: Any, at: Any, odd: bool) -> None:
  """Combines hits @ in[rows] into out[at] by a bitwise or; a row that is hit again is the same."""
  ones = hits.astype(in_refs[0].dtype)
  for in_ref, out_ref in zip(in_refs, out_refs, strict=True):
    for a in range(in_ref.shape[0]):
      moved = (_product_of_odd if odd else dot)(ones, in_ref[a, rows, :])
      moved = pltpu.bitcast(moved.astype(out_ref.dtype), jnp.int32)
      both = pltpu.bitcast(out_ref[a, at, :], jnp.int32) | moved
      out_ref[a, at, :] = pltpu.bitcast(both, out_ref.dtype)


def _product_of_odd(ones: Array, x: Array) -> Array:
  """ones @ x, where a non-finite number reaches only the row that it moves to."""
  wide = x.astype(jnp.float32)
  out = dot(ones, jnp.where(wide - wide == 0, wide, 0.0).astype(x.dtype))
  for odd in (jnp.inf, -jnp.inf, jnp.nan):
    is_odd = wide != wide if odd != odd else wide == odd
    out += jnp.where(dot(ones.astype(jnp.bfloat16), is_odd.astype(jnp.bfloat16)) > 0, odd, 0.0)
  return out
