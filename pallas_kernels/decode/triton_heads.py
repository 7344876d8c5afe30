"""One decoding step of a layer whose heads have caches of several kinds, lowered through Triton.

A call for each class of heads would take a launch or two more for each class, slices of query, key
and value, and programs that leave most of the GPU idle where a class has few heads. Here the grid
covers all heads. A program finds the class of its head, and every class divides its entries among
as many programs as give all programs nearly equal work. `triton_combine.py` combines the softmaxes.

Letters: P programs of a head. R query heads of a KV head. n heads of a class.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int

from pallas_kernels.decode.cache_arrays import CacheLengths, CompactHeads, HeadCache
from pallas_kernels.decode.triton_combine import combine
from pallas_kernels.decode.triton_dense import attend_tokens, TokenStep
from pallas_kernels.decode.triton_split import split_outputs, store_split, Tile
from pallas_kernels.decode.triton_step import attend_compact, CompactStep, NewToken
from pallas_kernels.decode.triton_tile import (
  empty_softmax,
  load_rows,
  MIN_DOT_SIDE,
  OnlineSoftmax,
)
from pallas_kernels.head_range import HeadRange
from pallas_kernels.kernel_common import out_struct

# More programs of one head take longer to combine.
_MOST_SPLITS = 64


class _ClassStep(NamedTuple):
  """One class of heads in the kernel. Static."""

  heads: HeadRange
  step: CompactStep | TokenStep
  structure: jax.tree_util.PyTreeDef  # of the arrays
  num_arrays: int
  num_lengths: int


def heads_step_triton(
  query: Float[Array, "B H D"],
  key: Float[Array, "B N D"],
  value: Float[Array, "B N D"],
  classes: Sequence[HeadCache],
  layer: Int[Array, ""] | int,
  score: Float[Array, "B N"] | None = None,
  *,
  scale: float,
  tile: Tile | None = None,
  interpret: bool = False,
) -> tuple[Float[Array, "B H D"], list[tuple[Any, Int[Array, "layers B"]]]]:
  """See `heads_step`."""
  tile = tile or Tile()
  (B, H, D), N = query.shape, key.shape[1]
  R, splits = H // N, _splits(classes, B, tile)
  steps = [
    _class_step(*each, R=R, scale=scale, tile=tile) for each in zip(classes, splits, strict=True)
  ]
  P = max(one.step.programs for one in steps)
  layer = jnp.reshape(jnp.asarray(layer, jnp.int32), 1)

  def whole(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda p, n, b: (0,) * x.ndim)

  def of_head(x: Array, heads: HeadRange) -> pl.BlockSpec:
    layers, _, _, *rest = x.shape
    first, last = heads.first, heads.first + heads.size - 1

    def index(p: Any, n: Any, b: Any) -> tuple[Any, ...]:
      # Programs of other heads do not read the block.
      return (0, b, jnp.clip(n, first, last) - first, *[0] * len(rest))

    return pl.BlockSpec((layers, None, None, *rest), index)

  token = pl.BlockSpec((None, None, D), lambda p, n, b: (b, n, 0))
  scores = [] if score is None else [score]
  lengths = [x for one in classes for x in one.lengths]
  arrays = [x for one in classes for x in jax.tree.leaves(one.arrays)]
  array_specs = [of_head(x, one.heads) for one in classes for x in jax.tree.leaves(one.arrays)]
  split_specs, split_structs = split_outputs(query, N, P)
  before = 4 + len(scores) + len(lengths)
  results = pl.pallas_call(
    functools.partial(_heads_kernel, steps=tuple(steps), heads_per_kv=R),
    grid=(P, N, B),
    in_specs=[
      whole(layer),
      pl.BlockSpec((None, R, D), lambda p, n, b: (b, n, 0)),
      token,
      token,
      [whole(x) for x in scores],
      [whole(x) for x in lengths],
      array_specs,
    ],
    out_specs=[*split_specs, *array_specs],
    out_shape=[*split_structs, *(out_struct(x, x.shape, x.dtype) for x in arrays)],
    input_output_aliases={before + i: len(split_specs) + i for i in range(len(arrays))},
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name="decode_heads",
  )(layer, query, key, value, scores, lengths, arrays)
  parts, updated = OnlineSoftmax(*results[: len(split_specs)]), results[len(split_specs) :]
  counted = [one.lengths[0] for one in classes]
  out, counted = combine(query, parts, counted, layer, interpret=interpret)
  caches = []
  for one, length in zip(steps, counted, strict=True):
    caches.append((jax.tree.unflatten(one.structure, updated[: one.num_arrays]), length))
    updated = updated[one.num_arrays :]
  return out, caches


def _splits(classes: Sequence[HeadCache], batch: int, tile: Tile) -> list[int]:
  """For each class the programs of a head, so that the programs of all heads fit the GPU at once.

  A program of any class reads at most as many entries as the others, or two tiles, unless a head
  then has more than `_MOST_SPLITS` programs.
  """
  entries = sum(one.heads.size * batch * one.entries for one in classes)
  least = max(2 * tile.entries, pl.cdiv(entries, tile.slots))
  # ⌈C / least⌉ programs of each head could be more than the GPU runs at once.
  while sum(one.heads.size * batch * pl.cdiv(one.entries, least) for one in classes) > max(
    tile.slots, sum(one.heads.size for one in classes) * batch
  ):
    least += tile.entries
  return [min(_MOST_SPLITS, pl.cdiv(one.entries, least)) for one in classes]


def _class_step(one: HeadCache, splits: int, *, R: int, scale: float, tile: Tile) -> _ClassStep:
  step: CompactStep | TokenStep
  if isinstance(one, CompactHeads):
    step = CompactStep(one.rule, scale, one.group_bias, tile.entries, R, splits)
  else:
    step = TokenStep(one.is_ring, scale, tile.entries, R, splits)
  leaves, structure = jax.tree.flatten(one.arrays)
  return _ClassStep(one.heads, step, structure, len(leaves), len(one.lengths))


def _heads_kernel(
  layer_ref: Any,
  q_ref: Any,
  key_ref: Any,
  value_ref: Any,
  score_refs: Any,
  length_refs: Any,
  array_refs: Any,
  acc_ref: Any,
  m_ref: Any,
  l_ref: Any,
  *out_refs: Any,
  steps: tuple[_ClassStep, ...],
  heads_per_kv: int,
) -> None:
  program, n, b = (pl.program_id(axis) for axis in range(3))
  layer, R = layer_ref[0], heads_per_kv
  q_MxD = load_rows(q_ref, (), 0, max(MIN_DOT_SIDE, pl.next_power_of_2(R)), R)
  softmax = empty_softmax(*q_MxD.shape)
  for one in steps:
    refs, array_refs = array_refs[: one.num_arrays], array_refs[one.num_arrays :]
    outs, out_refs = out_refs[: one.num_arrays], out_refs[one.num_arrays :]
    own_lengths, length_refs = length_refs[: one.num_lengths], length_refs[one.num_lengths :]
    first, last = one.heads.first, one.heads.first + one.heads.size - 1
    attend = functools.partial(
      _attend_class,
      one,
      q_MxD,
      (key_ref, value_ref),
      score_refs,
      jax.tree.unflatten(one.structure, refs),
      jax.tree.unflatten(one.structure, outs),
      own_lengths,
      (layer, program, n, b),
    )
    is_own = (n >= first) & (n <= last) & (program < one.step.programs)
    softmax = lax.cond(is_own, attend, lambda before=softmax: before)
  store_split(softmax, (acc_ref, m_ref, l_ref), R)


def _attend_class(
  one: _ClassStep,
  q_MxD: Array,
  new: tuple[Any, Any],
  score_refs: Any,
  cache: Any,
  out: Any,
  length_refs: Any,
  place: tuple[Array, Array, Array, Array],
) -> OnlineSoftmax:
  """This program's softmax over its part of the cache of a head of the class."""
  layer, program, n, b = place
  lengths = [ref[layer, b] for ref in length_refs]
  if isinstance(one.step, TokenStep):
    return attend_tokens(q_MxD, new, cache, out, lengths[0], layer, program, one.step)
  # A cache has scores of its block's tokens where focal scores choose the focal tokens.
  score = score_refs[0][b, n] if cache.block_score is not None else None
  token = NewToken(*new, score)
  return attend_compact(q_MxD, token, cache, out, CacheLengths(*lengths), layer, program, one.step)
