"""Segmented top-k without a sort, through Pallas-Triton: a threshold is found bit by bit.

One program serves one segment of one row. Scores are mapped to integers in the same order; the
threshold, the highest integer that at least `quota` scores reach, is settled from its highest bit
down by counting. The earliest scores equal to the threshold fill the rest of the quota. JAX will
remove this lowering; all code that depends on it is in files named triton_*.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Bool, Float

# Filters the deprecation warning of the lowering.
from pallas_kernels import triton_common  # noqa: F401
from pallas_kernels.dispatch import refuse
from pallas_kernels.kernel_common import out_struct
from pallas_kernels.segmented_top_k.ordered_keys import LOWEST_KEY, ordered_keys
from pallas_kernels.segmented_top_k.segments import Segments

# A program has at most 1024 threads. A segment of up to 32 scores a thread is read once and stays
# in registers; a longer one is read once a pass, in chunks that leave registers free.
_IN_REGISTERS = 2**15
_CHUNK = 2**14
_PER_THREAD = 16


def segmented_top_k_triton(
  scores_BxNxL: Float[Array, "B N L"],
  segments: Segments,
  *,
  chunk: int | None = None,
  interpret: bool = False,
) -> Bool[Array, "B N L"]:
  """See `segmented_top_k`. `chunk` overrides how many scores are held at once.

  Raises:
    NotImplementedError: for the reasons of `refusal`.
  """
  refuse(refusal(scores_BxNxL, segments))
  B, N, L = scores_BxNxL.shape
  C = segments.start.shape[1]
  chunk = chunk or (pl.next_power_of_2(L) if L <= _IN_REGISTERS else _CHUNK)
  row = pl.BlockSpec((None, None, L), lambda c, n, b: (b, n, 0))
  of_segment = pl.BlockSpec((None, None), lambda c, n, b: (b, c))
  mask_BxNxL = pl.pallas_call(
    functools.partial(_kernel, chunk=chunk),
    grid=(C, N, B),
    in_specs=[row, Segments(of_segment, of_segment, of_segment)],
    out_specs=row,
    out_shape=out_struct(scores_BxNxL, (B, N, L), jnp.int8),
    compiler_params=plgpu.CompilerParams(num_warps=_num_warps(chunk), num_stages=1),
    interpret=interpret,
    name="segmented_top_k",
  )(scores_BxNxL, segments)
  # Positions outside all segments are never written: mask them.
  return (mask_BxNxL != 0) & segments.inside(L).any(axis=1)[:, None]


def refusal(scores: Array, segments: Segments) -> str | None:
  """Why this kernel cannot run a call of `segmented_top_k`; None if it can."""
  del segments
  if scores.dtype != jnp.float32:
    return f"dtype is {scores.dtype}; it must be float32"
  return None


def _num_warps(chunk: int) -> int:
  return max(1, min(32, chunk // (32 * _PER_THREAD)))


def _kernel(scores_ref: Any, segments: Segments, mask_ref: Any, *, chunk: int) -> None:
  start, length = segments.start[...], segments.length[...]
  quota = jnp.minimum(segments.quota[...], length)
  single = chunk >= scores_ref.shape[0]

  def load(first: Array | int) -> Array:
    inside = first + jnp.arange(chunk) < length
    scores = plgpu.load(scores_ref.at[pl.ds(start + first, chunk)], mask=inside, other=0)
    return jnp.where(inside, ordered_keys(scores), LOWEST_KEY)

  if single:
    keys = load(0)

  def over_chunks[T](body: Callable[[Array | int, Array, T], T], carry: T) -> T:
    """Calls `body(first, keys, carry)` for the chunks of the segment, in order."""
    if single:
      return body(0, keys, carry)
    chunks = lax.div(length + chunk - 1, chunk)
    return lax.fori_loop(0, chunks, lambda i, c: body(i * chunk, load(i * chunk), c), carry)

  def counts(candidates: list[Array]) -> tuple[Array, ...]:
    def add(first: Array | int, keys: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
      del first
      return tuple(
        total + (keys >= candidate).astype(jnp.int32).sum()
        for total, candidate in zip(totals, candidates, strict=True)
      )

    return over_chunks(add, (jnp.int32(0),) * len(candidates))

  # A count costs one pass over registers, or one over memory: there, two bits at a time.
  bits = 1 if single else 2

  def settle(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    step, threshold, _ = state
    shift = 32 - bits * (step + 1)
    # Flipping bits of a prefix orders candidates: the sign bit of the lowest one is set.
    candidates = [threshold ^ lax.shift_left(jnp.int32(d), shift) for d in range(1, 2**bits)]
    reached = counts(candidates)
    digit = sum((n >= quota).astype(jnp.int32) for n in reached)
    exact = functools.reduce(jnp.logical_or, [n == quota for n in reached])
    return step + 1, threshold ^ lax.shift_left(digit, shift), exact

  def unsettled(state: tuple[Array, Array, Array]) -> Array:
    step, _, exact = state  # a threshold that exactly `quota` scores reach needs no further bits
    return (step < 32 // bits) & ~exact

  start_state = (jnp.int32(0), jnp.int32(LOWEST_KEY), jnp.bool_(False))
  _, threshold, _ = lax.while_loop(unsettled, settle, start_state)
  above = over_chunks(
    lambda first, keys, total: total + (keys > threshold).astype(jnp.int32).sum(), jnp.int32(0)
  )

  def write(first: Array | int, keys: Array, left: Array) -> Array:
    tied = (keys == threshold).astype(jnp.int32)
    chosen = (keys > threshold) | ((tied == 1) & (jnp.cumsum(tied) <= left))
    plgpu.store(
      mask_ref.at[pl.ds(start + first, chunk)],
      chosen.astype(jnp.int8),
      mask=first + jnp.arange(chunk) < length,
    )
    return left - tied.sum()

  over_chunks(write, quota - above)
