"""One decoding step of a layer whose heads have caches of several kinds, lowered through Triton.

A call for each class of heads would take a launch or two more for each class, slices of query, key
and value, and programs that leave most of the GPU idle where a class has few heads. Here the
programs of all heads share one grid, class after class. Every class divides its entries among as
many programs as give all programs nearly equal work. `triton_combine.py` combines the softmaxes.

Letters: P programs of a head. R query heads of a KV head. n heads of a class. t a program.
"""

import bisect
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
# Tiles of a program above which more programs than the GPU runs at once are faster.
_LONG = 16


class ClassStep(NamedTuple):
  """One class of heads in the kernel. Static."""

  heads: HeadRange
  step: CompactStep | TokenStep
  before: int  # programs of the classes before this one
  structure: jax.tree_util.PyTreeDef  # of the arrays
  num_arrays: int
  num_lengths: int

  @property
  def programs(self) -> int:
    """Programs of all heads of the class, for one sequence."""
    return self.heads.size * self.step.programs

  def head_of(self, t: Array) -> Array:
    """The head of program t as an index into the class; of other programs the nearest head."""
    head = lax.div(t - self.before, jnp.int32(self.step.programs))
    return jnp.clip(head, 0, self.heads.size - 1)

  def owns(self, t: Array) -> Array:
    """Whether program t is one of this class."""
    return (t >= self.before) & (t < self.before + self.programs)


def place_of(steps: Sequence[ClassStep], t: Array) -> tuple[Array, Array]:
  """The KV head of program t, and which of the head's programs it is."""
  n, p = jnp.int32(0), jnp.int32(0)
  for one in steps:
    head = one.head_of(t)
    n = jnp.where(one.owns(t), one.heads.first + head, n)
    p = jnp.where(one.owns(t), t - one.before - head * one.step.programs, p)
  return n, p


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
  R = H // N
  steps = class_steps(classes, B, R=R, scale=scale, tile=tile)
  layer = jnp.reshape(jnp.asarray(layer, jnp.int32), 1)

  def whole(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda t, b: (0,) * x.ndim)

  def of_head(x: Array, one: ClassStep) -> pl.BlockSpec:
    layers, _, _, *rest = x.shape
    # Programs of other classes do not read the block.
    return pl.BlockSpec(
      (layers, None, None, *rest), lambda t, b: (0, b, one.head_of(t), *[0] * len(rest))
    )

  def split_of(t: Any, b: Any) -> tuple[Any, Any, Any]:
    n, p = place_of(steps, t)
    return p, n, b

  token = pl.BlockSpec((None, None, D), lambda t, b: (b, place_of(steps, t)[0], 0))
  scores = [] if score is None else [score]
  lengths = [x for one in classes for x in one.lengths]
  arrays, array_specs = [], []
  for cache, one in zip(classes, steps, strict=True):
    leaves = jax.tree.leaves(cache.arrays)
    arrays += leaves
    array_specs += [of_head(x, one) for x in leaves]
  P = max(one.step.programs for one in steps)
  split_specs, split_structs = split_outputs(query, N, P, split_of)
  before = 4 + len(scores) + len(lengths)
  results = pl.pallas_call(
    functools.partial(_heads_kernel, steps=steps, heads_per_kv=R),
    grid=(sum(one.programs for one in steps), B),
    in_specs=[
      whole(layer),
      pl.BlockSpec((None, R, D), lambda t, b: (b, place_of(steps, t)[0], 0)),
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

  def num_splits(head: Array) -> Array:
    count, n = jnp.int32(0), lax.div(head, jnp.int32(R))
    for one in steps:
      first = one.heads.first
      is_own = (n >= first) & (n < first + one.heads.size)
      count = jnp.where(is_own, one.step.programs, count)
    return count

  out, counted = combine(query, parts, counted, layer, num_splits=num_splits, interpret=interpret)
  caches = []
  for one, length in zip(steps, counted, strict=True):
    caches.append((jax.tree.unflatten(one.structure, updated[: one.num_arrays]), length))
    updated = updated[one.num_arrays :]
  return out, caches


def class_steps(
  classes: Sequence[HeadCache], batch: int, *, R: int, scale: float, tile: Tile
) -> tuple[ClassStep, ...]:
  """The steps of all classes, with as many programs as the GPU runs at once if possible.

  A program of any class reads at most as many tiles as the others, or two, unless a head then has
  more than `_MOST_SPLITS` programs. Where programs would read more than `_LONG` tiles, there are
  twice as many: the GPU begins the next program where one ends, which balances their work.
  """

  def steps_of(most: int) -> tuple[ClassStep, ...]:
    steps: list[ClassStep] = []
    for one in classes:
      before = sum(other.programs for other in steps)
      steps.append(_class_step(one, before, most, R=R, scale=scale, tile=tile))
    return tuple(steps)

  def fits(most: int) -> bool:
    return batch * sum(one.programs for one in steps_of(most)) <= slots

  tiles = sum(one.heads.size * _num_tiles(one, tile) for one in classes)
  slots = tile.slots * (2 if batch * tiles > _LONG * tile.slots else 1)
  # With the last number, no class divides its entries.
  whole = max(2, 1 + max(_num_tiles(one, tile) for one in classes))
  return steps_of(2 + bisect.bisect_left(range(2, whole), True, key=fits))


def _class_step(
  one: HeadCache, before: int, most: int, *, R: int, scale: float, tile: Tile
) -> ClassStep:
  """The step of a class whose programs read at most `most` tiles each, where splits allow it."""

  def divided(splits: int) -> CompactStep | TokenStep:
    if isinstance(one, CompactHeads):
      return CompactStep(one.rule, scale, one.group_bias, tile.entries, R, splits)
    return TokenStep(one.is_ring, scale, tile.entries, R, splits)

  steps = map(divided, range(1, _MOST_SPLITS + 1))
  step = next((x for x in steps if tiles_of_program(one, x, tile) <= most), divided(_MOST_SPLITS))
  leaves, structure = jax.tree.flatten(one.arrays)
  return ClassStep(one.heads, step, before, structure, len(leaves), len(one.lengths))


def tiles_of_program(one: HeadCache, step: CompactStep | TokenStep, tile: Tile) -> int:
  """The most tiles that a program of a head reads of the entries that programs share."""
  if isinstance(step, CompactStep):
    return pl.cdiv(_num_tiles(one, tile) + step.block_tiles, step.splits)
  return pl.cdiv(_num_tiles(one, tile), step.programs)


def _num_tiles(one: HeadCache, tile: Tile) -> int:
  """Tiles of the entries of a head."""
  return sum(pl.cdiv(size, tile.entries) for size in one.sizes)


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
  steps: tuple[ClassStep, ...],
  heads_per_kv: int,
) -> None:
  t, b, layer, R = pl.program_id(0), pl.program_id(1), layer_ref[0], heads_per_kv
  n, program = place_of(steps, t)
  q_MxD = load_rows(q_ref, (), 0, max(MIN_DOT_SIDE, pl.next_power_of_2(R)), R)
  softmax = empty_softmax(*q_MxD.shape)
  for one in steps:
    refs, array_refs = array_refs[: one.num_arrays], array_refs[one.num_arrays :]
    outs, out_refs = out_refs[: one.num_arrays], out_refs[one.num_arrays :]
    own_lengths, length_refs = length_refs[: one.num_lengths], length_refs[one.num_lengths :]
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
    softmax = lax.cond(one.owns(t), attend, lambda before=softmax: before)
  store_split(softmax, (acc_ref, m_ref, l_ref), R)


def _attend_class(
  one: ClassStep,
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
