"""One decoding step of a layer, in place, lowered through Pallas-Triton (Ampere and newer).

The step has two kernels. The first runs P programs for each sequence and KV head. They divide the
compact entries and the raw tokens of earlier blocks, as split-KV (flash-decoding) does. Program 0
also appends the new token, attends to its block and, if the token completes the block, writes the
block's compact entries. No other program reads these writes in this step. A block of one tile
counts as a tile of program 0; a larger block is all that program 0 reads. The second kernel
combines the softmaxes of the splits.

Letters: M query heads of a KV head, rounded up; R of them exist. T entries of a tile. P splits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode.cache_arrays import BlockRule, CacheArrays, CacheLengths
from pallas_kernels.decode.cache_layout import CacheMask
from pallas_kernels.decode.triton_block import append_token, flush_block, load_block
from pallas_kernels.decode.triton_combine import combine
from pallas_kernels.decode.triton_split import (
  attend_split,
  Source,
  split_outputs,
  store_split,
  Tile,
)
from pallas_kernels.decode.triton_tile import (
  add_tile,
  empty_softmax,
  load_rows,
  MIN_DOT_SIDE,
  OnlineSoftmax,
)
from pallas_kernels.kernel_common import out_struct
from pallas_kernels.triton_common import dot


class CompactStep(NamedTuple):
  """What `attend_compact` does with a cache. Static.

  Attributes:
    rule: the layout of the cache, and how a complete block becomes compact entries.
    scale: of the attention logits.
    group_bias: added to the logits of groups.
    tile: T.
    heads: R.
    splits: programs that share the entries of earlier blocks.
  """

  rule: BlockRule
  scale: float
  group_bias: float
  tile: int
  heads: int
  splits: int

  @property
  def has_block_program(self) -> bool:
    """Whether one more program reads the new token's block alone.

    On an H200 a block of 128 tokens takes 13 µs, as long as seven tiles.
    """
    return self.splits > 1 and self.rule.layout.block_size > self.tile

  @property
  def programs(self) -> int:
    """P."""
    return self.splits + self.has_block_program

  @property
  def block_tiles(self) -> int:
    """Tiles that the new token's block counts among those that the programs share."""
    return 0 if self.has_block_program else pl.cdiv(self.rule.layout.block_size, self.tile)


def step_triton(
  query: Array,
  key: Array,
  value: Array,
  cache: CacheArrays,
  lengths: CacheLengths,
  layer: Array | int,
  score: Array | None = None,
  *,
  rule: BlockRule,
  scale: float,
  group_bias: float,
  tile: Tile | None = None,
  interpret: bool = False,
) -> tuple[Array, CacheArrays, Array]:
  """See `step_in_place`."""
  tile = tile or Tile()
  B, H, D = query.shape
  (N, C), W = cache.compact_key.shape[-3:-1], cache.raw_key.shape[-2]
  R, splits = H // N, tile.num_splits(B * N, C + W)
  static = CompactStep(rule, scale, group_bias, tile.entries, R, splits)
  P = static.programs
  layer = jnp.reshape(jnp.asarray(layer, jnp.int32), 1)

  def whole(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda p, n, b: (0,) * x.ndim)

  def of_head(x: Array) -> pl.BlockSpec:
    layers, _, _, *rest = x.shape
    return pl.BlockSpec((layers, None, None, *rest), lambda p, n, b: (0, b, n, *[0] * len(rest)))

  token = pl.BlockSpec((None, None, D), lambda p, n, b: (b, n, 0))
  split_specs, split_structs = split_outputs(query, N, P)
  arrays, structure = jax.tree.flatten(cache)
  scores = [] if score is None else [score]
  inputs_before = 4 + len(lengths) + len(scores)
  results = pl.pallas_call(
    functools.partial(_step_kernel, structure=structure, static=static),
    grid=(P, N, B),
    in_specs=[
      whole(layer),
      [whole(x) for x in lengths],
      pl.BlockSpec((None, R, D), lambda p, n, b: (b, n, 0)),
      token,
      token,
      [whole(x) for x in scores],
      [of_head(x) for x in arrays],
    ],
    out_specs=[*split_specs, *(of_head(x) for x in arrays)],
    out_shape=[*split_structs, *(out_struct(x, x.shape, x.dtype) for x in arrays)],
    input_output_aliases={inputs_before + i: len(split_specs) + i for i in range(len(arrays))},
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name="decode_step",
  )(layer, list(lengths), query, key, value, scores, arrays)
  parts = OnlineSoftmax(*results[: len(split_specs)])
  out, (length,) = combine(query, parts, [lengths.length], layer, interpret=interpret)
  return out, jax.tree.unflatten(structure, results[len(split_specs) :]), length


def _step_kernel(
  layer_ref: Any,
  length_refs: Any,
  q_ref: Any,
  key_ref: Any,
  value_ref: Any,
  score_refs: Any,
  array_refs: Any,
  acc_ref: Any,
  m_ref: Any,
  l_ref: Any,
  *out_refs: Any,
  structure: jax.tree_util.PyTreeDef,
  static: CompactStep,
) -> None:
  n, b, layer, R = pl.program_id(1), pl.program_id(2), layer_ref[0], static.heads
  cache, out = (jax.tree.unflatten(structure, refs) for refs in (array_refs, out_refs))
  q_MxD = load_rows(q_ref, (), 0, max(MIN_DOT_SIDE, pl.next_power_of_2(R)), R)
  score = score_refs[0][b, n] if score_refs else None
  new = NewToken(key_ref, value_ref, score)
  lengths = CacheLengths(*(ref[layer, b] for ref in length_refs))
  softmax = attend_compact(q_MxD, new, cache, out, lengths, layer, pl.program_id(0), static)
  store_split(softmax, (acc_ref, m_ref, l_ref), R)


class NewToken(NamedTuple):
  """References to the key and value of the new token, and its focal score or None."""

  key_ref: Any
  value_ref: Any
  score: Array | None


def attend_compact(
  q_MxD: Array,
  new: NewToken,
  cache: CacheArrays,
  out: CacheArrays,
  lengths: CacheLengths,
  layer: Array,
  program: Array,
  static: CompactStep,
) -> OnlineSoftmax:
  """This program's softmax over its part of one head's compact cache; appends the new token.

  Args:
    q_MxD: queries of the head.
    new: the new token.
    cache: references to the head's arrays of all layers.
    out: references to the same memory, for writing.
    lengths: of the sequence.
    layer: of the cache.
    program: which of the head's programs this is.
    static: see `CompactStep`.
  """
  rule, R = static.rule, static.heads
  length, origin, prefix, prefix_focal = lengths
  token = rule.layout.locate(length, origin)
  mask = rule.layout.earlier_blocks(token, prefix)
  empty = empty_softmax(*q_MxD.shape)

  def own_block() -> OnlineSoftmax:
    block = load_block(cache, layer, token, new.key_ref, new.value_ref, new.score, rule.layout)
    dots_MxS = dot(q_MxD, block.key, trans_b=True)
    is_visible_S = jnp.arange(dots_MxS.shape[1]) <= token.offset
    logits_MxS = jnp.where(is_visible_S[None], dots_MxS * static.scale, -jnp.inf)
    softmax = add_tile(empty, logits_MxS, block.value, None)
    append_token(out, layer, block)

    @pl.when(rule.layout.completes_block(token))
    def _() -> None:
      flush_block(out, layer, block, dots_MxS, prefix, rule=rule, heads=R)

    return softmax

  def group_bias(entry_T: Array) -> Array:
    is_group_T = rule.layout.is_group(entry_T, prefix, prefix_focal)
    return jnp.where(is_group_T, static.group_bias, 0.0)

  softmax = lax.cond(program == 0, own_block, lambda: empty)
  return attend_split(
    softmax,
    q_MxD,
    _sources(cache, mask, group_bias if static.group_bias else None, rule),
    layer,
    T=static.tile,
    scale=static.scale,
    split=program - int(static.has_block_program),
    num_splits=static.splits,
    tiles_before=static.block_tiles,
  )


def _sources(
  cache: CacheArrays, mask: CacheMask, bias: Callable[[Array], Array] | None, rule: BlockRule
) -> list[Source]:
  """The compact entries and, if there is a window, the raw tokens of earlier blocks."""
  end = jnp.minimum(cache.compact_key.shape[1], mask.compact_end)
  mask = mask._replace(compact_end=end)
  compact = Source(
    key_ref=cache.compact_key,
    value_ref=cache.compact_value,
    key_scale_ref=cache.key_scale,
    value_scale_ref=cache.value_scale,
    end=end,
    is_visible=mask.sees_entry,
    bias=bias,
  )
  raw = Source(cache.raw_key, cache.raw_value, None, None, mask.raw_end, mask.sees_slot)
  return [compact, raw] if rule.layout.window else [compact]
