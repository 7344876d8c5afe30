"""One decoding step of a layer, in place, lowered through Pallas-Triton (Ampere and newer).

Two kernels a layer. The first has a few programs for each sequence and KV head, which share the
summaries and the raw tokens of earlier blocks. The first of them also appends the new token,
attends to its block and, where the token completes it, summarises it: what that writes no program
of this step reads. The second kernel joins the softmaxes of the programs.

Letters: M query heads of a KV head, rounded up; S tokens of a block, rounded up; T tile; P programs
that share a KV head's entries, and Q of them rounded up.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode.cache_arrays import BlockRule, CacheArrays, CacheLengths, is_group
from pallas_kernels.decode.triton_combine import join
from pallas_kernels.decode.triton_tile import add_tile, load_rows, MASK_VALUE, Softmax, store_rows
from pallas_kernels.kernel_common import out_struct
from pallas_kernels.triton_common import dot

_LEAST = 16  # of a side of a matrix product


class Tile(NamedTuple):
  """How the work is cut: entries of a tile, and programs that a device should get at least."""

  block: int = 64
  programs: int = 256
  num_warps: int = 4
  num_stages: int = 3

  def shares(self, heads: int, entries: int) -> int:
    """Programs for each of `heads` KV heads, over all sequences, with so many entries each."""
    most = max(1, pl.cdiv(entries, 2 * self.block))
    return min(most, pl.cdiv(self.programs, heads))


class _Static(NamedTuple):
  blocks: BlockRule
  scale: float
  bias: float
  block: int
  heads: int  # R


def step_triton(
  query: Array,
  key: Array,
  value: Array,
  store: CacheArrays,
  progress: CacheLengths,
  layer: Array | int,
  *,
  blocks: BlockRule,
  scale: float,
  bias: float,
  tile: Tile | None = None,
  interpret: bool = False,
) -> tuple[Array, CacheArrays, Array]:
  """See `step_in_place`."""
  tile = tile or Tile()
  B, H, D = query.shape
  (N, C), W = store.compact_key.shape[-3:-1], store.raw_key.shape[-2]
  R, P = H // N, tile.shares(B * N, C + W)
  static = _Static(blocks, scale, bias, tile.block, R)
  layer = jnp.reshape(jnp.asarray(layer, jnp.int32), 1)

  def whole(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda p, n, b: (0,) * x.ndim)

  def of_head(x: Array) -> pl.BlockSpec:
    layers, _, _, *rest = x.shape
    return pl.BlockSpec((layers, None, None, *rest), lambda p, n, b: (0, b, n, *[0] * len(rest)))

  token = pl.BlockSpec((None, None, D), lambda p, n, b: (b, n, 0))

  def of_part(*last: int) -> tuple[pl.BlockSpec, Any]:
    """A row of every query head for each program."""
    spec = pl.BlockSpec((None, R, None, *last), lambda p, n, b: (b, n, p, *[0] * len(last)))
    return spec, out_struct(query, (B, H, P, *last), jnp.float32)

  parts = [of_part(D), of_part(), of_part()]
  stored = store.arrays()
  before = 4 + len(progress)
  results = pl.pallas_call(
    functools.partial(_step_kernel, static=static),
    grid=(P, N, B),
    in_specs=[
      whole(layer),
      [whole(x) for x in progress],
      pl.BlockSpec((None, R, D), lambda p, n, b: (b, n, 0)),
      token,
      token,
      [of_head(x) for x in stored],
    ],
    out_specs=[*(spec for spec, _ in parts), *(of_head(x) for x in stored)],
    out_shape=[
      *(shape for _, shape in parts),
      *(out_struct(x, x.shape, x.dtype) for x in stored),
    ],
    input_output_aliases={before + i: len(parts) + i for i in range(len(stored))},
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name="decode_step",
  )(layer, list(progress), query, key, value, stored)
  out, length = join(query, results[: len(parts)], progress.length, layer, interpret=interpret)
  return out, CacheArrays(*results[len(parts) :]), length


class _Place(NamedTuple):
  """Where the new token stands; scalars."""

  in_prefix: Array
  position: Array
  block: Array
  offset: Array
  begin: Array  # of its block in the raw ring
  compact_end: Array  # entries that it sees, itself not counted
  raw_end: Array  # raw tokens of the ring that it sees, but for its own block


def _place(
  progress: CacheLengths, layer: Array, b: Array, blocks: BlockRule, entries: int
) -> _Place:
  length, origin, prefix, _ = (ref[layer, b] for ref in progress)
  after = length - origin
  in_prefix = after < 0
  after = jnp.maximum(after, 0)
  size, ring = blocks.size, blocks.window + 1
  block, offset = lax.div(after, size), lax.rem(after, size)
  begin = lax.rem(block, ring) * size
  summarised = jnp.maximum(block - blocks.window, 0)
  full = block >= blocks.window
  return _Place(
    in_prefix,
    length,
    block,
    offset,
    begin,
    jnp.minimum(entries, jnp.where(in_prefix, length, prefix + (blocks.focal + 1) * summarised)),
    jnp.where(in_prefix, 0, jnp.where(full, ring * size, begin)),
  )


def _step_kernel(
  layer_ref: Any,
  progress: Any,
  q_ref: Any,
  key_ref: Any,
  value_ref: Any,
  stored: Any,
  sum_ref: Any,
  top_ref: Any,
  total_ref: Any,
  *out_refs: Any,
  static: _Static,
) -> None:
  layer, progress = layer_ref[0], CacheLengths(*progress)
  store, out = CacheArrays(*stored), CacheArrays(*out_refs)
  share, shares, b = pl.program_id(0), pl.num_programs(0), pl.program_id(2)
  blocks, T = static.blocks, static.block
  R, D = static.heads, q_ref.shape[-1]
  M = max(_LEAST, pl.next_power_of_2(R))
  place = _place(progress, layer, b, blocks, store.compact_key.shape[1])
  q_MxD = load_rows(q_ref, (), 0, M, R)

  def attend(
    seen: Softmax, keys: Any, values: Any, first: Array, end: Array, visible: Callable[..., Any]
  ) -> Softmax:
    """One tile of entries: of keys and values, each a reference and one of scales, if any."""
    at = (layer,)
    entry_T = first + jnp.arange(T)
    logits_MxT = dot(q_MxD, load_rows(keys[0], at, first, T, end).astype(q_MxD.dtype), trans_b=True)
    value_TxD = load_rows(values[0], at, first, T, end).astype(q_MxD.dtype)
    weight_T = None
    if keys[1] is not None:
      key_T, weight_T = (
        plgpu.load(ref.at[layer, pl.ds(first, T)], mask=entry_T < end, other=0)
        for ref in (keys[1], values[1])
      )
      logits_MxT *= key_T[None]
    logits_MxT *= static.scale
    seen_T, bias_T = visible(entry_T)
    if bias_T is not None:
      logits_MxT += bias_T[None]
    logits_MxT = jnp.where(seen_T[None], logits_MxT, -jnp.inf)
    return add_tile(seen, logits_MxT, value_TxD, weight_T)

  def of_compact(entry_T: Array) -> tuple[Array, Array | None]:
    bias_T = None
    if static.bias:
      first, prefix = progress.prefix_focal[layer, b], progress.prefix[layer, b]
      grouped_T = is_group(entry_T, first, prefix, blocks.focal + 1)
      bias_T = jnp.where(grouped_T, static.bias, 0.0)
    return entry_T < place.compact_end, bias_T

  def of_ring(slot_T: Array) -> tuple[Array, None]:
    own_T = (slot_T >= place.begin) & (slot_T < place.begin + blocks.size)
    return (slot_T < place.raw_end) & ~own_T, None

  def share_of(seen: Softmax, keys: Any, values: Any, end: Array, visible: Any) -> Softmax:
    tiles = lax.div(end + (T - 1), T)
    each = lax.div(tiles + (shares - 1), shares)
    last = jnp.minimum((share + 1) * each, tiles)
    return lax.fori_loop(
      share * each, last, lambda t, s: attend(s, keys, values, t * T, end, visible), seen
    )

  nothing = Softmax(
    jnp.zeros((M, D), jnp.float32), jnp.full((M,), MASK_VALUE), jnp.zeros((M,), jnp.float32)
  )
  own = functools.partial(
    _own_block, nothing, q_MxD, key_ref, value_ref, store, out, place, layer, progress, b, static
  )
  seen = lax.cond(share == 0, own, lambda: nothing)
  compact = ((store.compact_key, store.key_scale), (store.compact_value, store.value_scale))
  seen = share_of(seen, *compact, place.compact_end, of_compact)
  if blocks.window:
    seen = share_of(seen, (store.raw_key, None), (store.raw_value, None), place.raw_end, of_ring)
  real_M = jnp.arange(M) < R
  rows = pl.ds(0, M)
  plgpu.store(sum_ref.at[rows, :], seen.sum, mask=jnp.broadcast_to(real_M[:, None], seen.sum.shape))
  plgpu.store(top_ref.at[rows], seen.top, mask=real_M)
  plgpu.store(total_ref.at[rows], seen.total, mask=real_M)


def _own_block(
  nothing: Softmax,
  q_MxD: Array,
  key_ref: Any,
  value_ref: Any,
  store: CacheArrays,
  out: CacheArrays,
  place: _Place,
  layer: Array,
  progress: CacheLengths,
  b: Array,
  static: _Static,
) -> Softmax:
  """Appends the new token, attends to its block as far as it goes, and flushes a complete one."""
  blocks = static.blocks
  S = max(_LEAST, pl.next_power_of_2(blocks.size))
  place_S = jnp.arange(S)
  raw_end = place.begin + jnp.where(place.in_prefix, 0, place.offset)

  def with_token(raw_ref: Any, token_ref: Any) -> Array:
    token_D = token_ref[...]
    earlier_SxD = load_rows(raw_ref, (layer,), place.begin, S, raw_end)
    return jnp.where((place_S == place.offset)[:, None], token_D[None], earlier_SxD)

  key_SxD = with_token(store.raw_key, key_ref)
  value_SxD = with_token(store.raw_value, value_ref)
  dots_MxS = dot(q_MxD, key_SxD, trans_b=True)
  seen_S = jnp.where(place.in_prefix, place_S == place.offset, place_S <= place.offset)
  logits_MxS = jnp.where(seen_S[None], dots_MxS * static.scale, -jnp.inf)
  seen = add_tile(nothing, logits_MxS, value_SxD, None)

  new_S = place_S == place.offset
  for rows_SxD, raw, compact, scales in (
    (key_SxD, out.raw_key, out.compact_key, out.key_scale),
    (value_SxD, out.raw_value, out.compact_value, out.value_scale),
  ):
    store_rows(raw, None, layer, place.begin + place_S, rows_SxD, new_S & ~place.in_prefix)
    at = place.position + (place_S - place.offset)
    store_rows(compact, scales, layer, at, rows_SxD, new_S & place.in_prefix)

  @pl.when(~place.in_prefix & (place.offset == blocks.size - 1))
  def _() -> None:
    first = progress.prefix[layer, b] + (blocks.focal + 1) * place.block
    focal_S, weight_S = _choose(dots_MxS, static)
    rank_S = jnp.cumsum(focal_S.astype(jnp.int32)) - 1
    for rows_SxD, compact, scales in (
      (key_SxD, out.compact_key, out.key_scale),
      (value_SxD, out.compact_value, out.value_scale),
    ):
      store_rows(compact, scales, layer, first + rank_S, rows_SxD, focal_S)
      group_D = (weight_S[:, None] * rows_SxD.astype(jnp.float32)).sum(axis=0)
      group_SxD = jnp.broadcast_to(group_D[None], rows_SxD.shape).astype(rows_SxD.dtype)
      at = first + blocks.focal + place_S
      store_rows(compact, scales, layer, at, group_SxD, place_S == 0)

  return seen


def _choose(dots_MxS: Array, static: _Static) -> tuple[Array, Array]:
  """Which of a block's tokens are focal, and the weights [S] by which the others are merged."""
  blocks, R = static.blocks, static.heads
  M, S = dots_MxS.shape
  place_S, real_Mx1 = jnp.arange(S), (jnp.arange(M) < R)[:, None]
  exists_S = place_S < blocks.size

  def weights(logits_MxS: Array, of_S: Array) -> Array:
    """Softmax of every query head over some tokens, summed over the heads."""
    logits_MxS = jnp.where(of_S[None], logits_MxS, MASK_VALUE)
    raised_MxS = jnp.exp(logits_MxS - logits_MxS.max(axis=1)[:, None])
    raised_MxS = jnp.where(of_S[None] & real_Mx1, raised_MxS, 0.0)
    total_M = raised_MxS.sum(axis=1)
    return (raised_MxS / jnp.where(total_M == 0, 1.0, total_M)[:, None]).sum(axis=0)

  score_S = jnp.where(exists_S, weights(dots_MxS * blocks.choice_scale, exists_S), -1.0)
  focal_S = jnp.zeros((S,), jnp.bool_)
  for _ in range(blocks.focal):
    left_S = jnp.where(focal_S, -2.0, score_S)
    best = jnp.where(left_S == left_S.max(), place_S, S).min()
    focal_S |= place_S == best
  members_S = exists_S & ~focal_S
  return focal_S, weights(dots_MxS * blocks.merge_scale, members_S) / R
