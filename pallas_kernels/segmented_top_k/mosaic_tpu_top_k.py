"""Segmented top-k without a sort on a TPU: a threshold is found bit by bit, then a last position.

One program serves one row. Scores are mapped to integers in the same order; the threshold, the
highest integer that at least `quota` scores of a segment reach, is settled from its highest bit
down by counting. If more scores equal the threshold than the quota allows, the last position that
is selected is settled in the same way. A count reads only the tiles that hold the segment.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float

from pallas_kernels.dispatch import refuse
from pallas_kernels.kernel_common import out_struct
from pallas_kernels.mosaic_tpu_common import Interpret, LANES
from pallas_kernels.segmented_top_k.ordered_keys import LOWEST_KEY, ordered_keys
from pallas_kernels.segmented_top_k.segments import Segments

_ROWS = 32  # of 128 scores in a tile of a count: the tile height of int8, the mask's dtype
_TILE = _ROWS * LANES
_MAX_SCORES = 2**19  # of a row: all of it is in VMEM


def segmented_top_k_mosaic_tpu(
  scores_BxNxL: Float[Array, "B N L"], segments: Segments, *, interpret: Interpret = False
) -> Bool[Array, "B N L"]:
  """See `segmented_top_k`.

  Raises:
    NotImplementedError: for the reasons of `refusal`.
  """
  refuse(refusal(scores_BxNxL, segments))
  B, N, L = scores_BxNxL.shape
  tiles = pl.cdiv(L, _TILE)
  padding = ((0, 0), (0, 0), (0, tiles * _TILE - L))
  scores_BxNxtxSxW = jnp.pad(scores_BxNxL, padding).reshape(B, N, tiles, _ROWS, LANES)
  row = pl.BlockSpec((None, None, tiles, _ROWS, LANES), lambda b, n, *_: (b, n, 0, 0, 0))
  passes = 32 + 2
  mask_BxNxtxSxW = pl.pallas_call(
    _kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(B, N),
      in_specs=[row],
      out_specs=row,
      scratch_shapes=[pltpu.VMEM((tiles, _ROWS, LANES), jnp.int32)],
    ),
    out_shape=out_struct(scores_BxNxL, scores_BxNxtxSxW.shape, jnp.int8),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    cost_estimate=pl.CostEstimate(
      flops=2 * passes * B * N * L, bytes_accessed=5 * B * N * L, transcendentals=0
    ),
    interpret=interpret,
    name="segmented_top_k",
  )(*(jnp.asarray(x, jnp.int32) for x in segments), scores_BxNxtxSxW)
  return mask_BxNxtxSxW.reshape(B, N, -1)[..., :L] != 0


def refusal(scores: Array, segments: Segments) -> str | None:
  """Why this kernel cannot run a call of `segmented_top_k`; None if it can."""
  del segments
  if scores.dtype != jnp.float32:
    return f"dtype is {scores.dtype}; it must be float32"
  if scores.shape[-1] > _MAX_SCORES:
    return f"a row has {scores.shape[-1]} scores; at most {_MAX_SCORES} fit VMEM"
  return None


def _kernel(
  start_ref: Any, length_ref: Any, quota_ref: Any, scores_ref: Any, mask_ref: Any, keys_ref: Any
) -> None:
  keys_ref[...] = ordered_keys(scores_ref[...])
  mask_ref[...] = jnp.zeros_like(mask_ref)
  row = pl.program_id(0)
  num_segments = start_ref.shape[1]

  @pl.loop(0, num_segments)
  def _(c: Array) -> None:
    start, length = start_ref[row, c], length_ref[row, c]
    quota = jnp.minimum(quota_ref[row, c], length)

    @pl.when(quota > 0)
    def _() -> None:
      _select(_Segment(keys_ref, start, start + length), quota, mask_ref)


class _Segment:
  """The scores of one segment as ordered keys, read in tiles."""

  def __init__(self, keys_ref: Any, start: Array, end: Array) -> None:
    self.keys_ref, self.start, self.end = keys_ref, start, end
    self.first_tile = lax.div(start, _TILE)
    self.end_tile = lax.div(end + (_TILE - 1), _TILE)

  def tile(self, t: Array) -> tuple[Array, Array, Array]:
    """Positions and keys of a tile, and whether each is in the segment."""
    position_SxW = (
      t * _TILE
      + lax.broadcasted_iota(jnp.int32, (_ROWS, LANES), 0) * LANES
      + lax.broadcasted_iota(jnp.int32, (_ROWS, LANES), 1)
    )
    keys_SxW = self.keys_ref[t]
    return position_SxW, keys_SxW, (position_SxW >= self.start) & (position_SxW < self.end)

  def count(self, holds: Callable[[Array, Array], Array]) -> Array:
    """For how many scores `holds(positions, keys)` is true."""

    def add(t: Array, total_SxW: Array) -> Array:
      position_SxW, keys_SxW, inside_SxW = self.tile(t)
      return total_SxW + (holds(position_SxW, keys_SxW) & inside_SxW).astype(jnp.int32)

    zeros_SxW = jnp.zeros((_ROWS, LANES), jnp.int32)
    return jnp.sum(lax.fori_loop(self.first_tile, self.end_tile, add, zeros_SxW))


def _select(scores: _Segment, quota: Array, mask_ref: Any) -> None:
  """Writes 1 at the `quota` highest scores of a segment."""

  def settle_key(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    step, threshold, _ = state
    # The sign bit of the lowest candidate is set: flipping it orders candidates.
    candidate = threshold ^ lax.shift_left(jnp.int32(1), 31 - step)
    reached = scores.count(lambda position, keys: keys >= candidate)
    return step + 1, jnp.where(reached >= quota, candidate, threshold), reached

  def key_unsettled(state: tuple[Array, Array, Array]) -> Array:
    step, _, reached = state  # a threshold that exactly `quota` scores reach needs no further bits
    return (step < 32) & (reached != quota)

  _, threshold, reached = lax.while_loop(
    key_unsettled, settle_key, (jnp.int32(0), jnp.int32(LOWEST_KEY), jnp.int32(-1))
  )
  above = scores.count(lambda position, keys: keys > threshold)

  # Of the scores equal to the threshold, those before `end` are selected: the first `end` with
  # enough of them.
  def settle_end(state: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = state  # too few before low, enough before high
    middle = lax.div(low + high, 2)
    tied = scores.count(lambda position, keys: (keys == threshold) & (position < middle))
    enough = tied >= quota - above
    return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

  all_tied = reached == quota
  _, end = lax.while_loop(
    lambda state: state[1] - state[0] > 1,
    settle_end,
    (jnp.where(all_tied, scores.end - 1, scores.start), scores.end),
  )

  def write(t: Array, carry: None) -> None:
    position_SxW, keys_SxW, inside_SxW = scores.tile(t)
    selected_SxW = (keys_SxW > threshold) | ((keys_SxW == threshold) & (position_SxW < end))
    # Segments are disjoint, and a tile may hold parts of several.
    mask_ref[t] = mask_ref[t] | (selected_SxW & inside_SxW).astype(jnp.int32).astype(jnp.int8)

  lax.fori_loop(scores.first_tile, scores.end_tile, write, None)
