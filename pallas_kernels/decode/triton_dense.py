"""One decoding step of dense attention, in place, lowered through Pallas-Triton (Ampere and newer).

P programs divide the entries of each sequence and KV head, as split-KV (flash-decoding) does.
Program 0 also attends to the new token and appends it. A second kernel combines the splits.

Letters: M query heads of a KV head, rounded up; R of them exist. S rows of the new token's tile.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode.cache_arrays import TokenArrays, TokenRows
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
  store_rows,
)
from pallas_kernels.kernel_common import out_struct
from pallas_kernels.triton_common import dot, head_refusal


class TokenStep(NamedTuple):
  """What `attend_tokens` does with a cache. Static.

  Attributes:
    is_ring: whether a token replaces the token W before it. Else tokens beyond W are not stored.
    scale: of the attention logits.
    tile: T.
    heads: R.
    programs: P.
  """

  is_ring: bool
  scale: float
  tile: int
  heads: int
  programs: int


def dense_step_triton(
  query: Array,
  key: Array,
  value: Array,
  tokens: TokenRows,
  length: Array,
  layer: Array | int,
  *,
  scale: float,
  tile: Tile | None = None,
  interpret: bool = False,
) -> tuple[Array, TokenRows, Array]:
  """See `dense_step`."""
  tile = tile or Tile()
  (B, H, D), (N, C) = query.shape, tokens.key.shape[-3:-1]
  P = tile.num_splits(B * N, C)
  static = TokenStep(False, scale, tile.entries, H // N, P)
  layer = jnp.reshape(jnp.asarray(layer, jnp.int32), 1)
  split_specs, split_structs = split_outputs(query, N, P)

  def whole(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda p, n, b: (0,) * x.ndim)

  def of_head(x: Array) -> pl.BlockSpec:
    layers, _, _, *rest = x.shape
    return pl.BlockSpec((layers, None, None, *rest), lambda p, n, b: (0, b, n, *[0] * len(rest)))

  token = pl.BlockSpec((None, None, D), lambda p, n, b: (b, n, 0))
  arrays, structure = jax.tree.flatten(tokens)
  results = pl.pallas_call(
    functools.partial(_dense_kernel, structure=structure, static=static),
    grid=(P, N, B),
    in_specs=[
      whole(layer),
      whole(length),
      pl.BlockSpec((None, H // N, D), lambda p, n, b: (b, n, 0)),
      token,
      token,
      [of_head(x) for x in arrays],
    ],
    out_specs=[*split_specs, *(of_head(x) for x in arrays)],
    out_shape=[*split_structs, *(out_struct(x, x.shape, x.dtype) for x in arrays)],
    input_output_aliases={5 + i: len(split_specs) + i for i in range(len(arrays))},
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name="decode_dense",
  )(layer, length, query, key, value, arrays)
  splits, updated = OnlineSoftmax(*results[: len(split_specs)]), results[len(split_specs) :]
  out, (length,) = combine(query, splits, [length], layer, interpret=interpret)
  return out, jax.tree.unflatten(structure, updated), length


def refusal(query: Array, *_: Any, **options: Any) -> str | None:
  """Why the kernel cannot run a call; None if it can."""
  del options
  return head_refusal(query)


def _dense_kernel(
  layer_ref: Any,
  length_ref: Any,
  q_ref: Any,
  new_key_ref: Any,
  new_value_ref: Any,
  array_refs: Any,
  acc_ref: Any,
  m_ref: Any,
  l_ref: Any,
  *out_refs: Any,
  structure: jax.tree_util.PyTreeDef,
  static: TokenStep,
) -> None:
  b, layer, R = pl.program_id(2), layer_ref[0], static.heads
  q_MxD = load_rows(q_ref, (), 0, max(MIN_DOT_SIDE, pl.next_power_of_2(R)), R)
  new, length = (new_key_ref, new_value_ref), length_ref[layer, b]
  cache, out = (TokenArrays(jax.tree.unflatten(structure, refs)) for refs in (array_refs, out_refs))
  softmax = attend_tokens(q_MxD, new, cache, out, length, layer, pl.program_id(0), static)
  store_split(softmax, (acc_ref, m_ref, l_ref), R)


def attend_tokens(
  q_MxD: Array,
  new: tuple[Any, Any],
  cache: TokenArrays,
  out: TokenArrays,
  length: Array,
  layer: Array,
  program: Array,
  static: TokenStep,
) -> OnlineSoftmax:
  """This program's softmax over its part of one head's cache; appends the new token.

  Args:
    q_MxD: queries of the head.
    new: references to the key and value of the new token.
    cache: references to the head's arrays of all layers.
    out: references to the same memory, for writing.
    length: tokens of the sequence before the new one.
    layer: of the cache.
    program: which of the head's programs this is.
    static: see `TokenStep`.
  """
  empty, W = empty_softmax(*q_MxD.shape), cache.tokens.key.shape[1]
  sinks = 0 if cache.sinks is None else cache.sinks.key.shape[1]
  slot = length - sinks  # Negative for a sink.
  if static.is_ring:
    slot = jnp.where(slot < 0, slot, lax.rem(slot, jnp.int32(W)))
  held = jnp.minimum(length - sinks, W)

  def new_token() -> OnlineSoftmax:
    is_new_S = jnp.arange(MIN_DOT_SIDE) == 0
    key_SxD, value_SxD = (jnp.where(is_new_S[:, None], ref[...][None], 0) for ref in new)
    # Its own query reads the new token as later queries read it: after rounding.
    rows = TokenRows.pack(key_SxD, value_SxD, cache.tokens.key.dtype)
    logits_MxS = dot(q_MxD, rows.key.astype(q_MxD.dtype), trans_b=True)
    if rows.key_scale is not None:
      logits_MxS *= rows.key_scale[None]
    logits_MxS = jnp.where(is_new_S[None], logits_MxS * static.scale, -jnp.inf)
    # Rows at or beyond the end of an array are not stored.
    rows_S = jnp.arange(MIN_DOT_SIDE)
    for first, to, is_here in (
      (slot, out.tokens, slot >= 0),
      (length, out.sinks, length < sinks),
    ):
      if to is not None:
        mask_S = is_new_S & is_here
        store_rows(to.key, to.key_scale, layer, first + rows_S, key_SxD, mask_S)
        store_rows(to.value, to.value_scale, layer, first + rows_S, value_SxD, mask_S)
    return add_tile(empty, logits_MxS, rows.value.astype(q_MxD.dtype), rows.value_scale)

  softmax = lax.cond(program == 0, new_token, lambda: empty)
  # A full ring's oldest token leaves the window: the new one replaces it.
  sources = [Source(*cache.tokens, held, lambda at_T: (at_T < held) & (at_T != slot))]
  if cache.sinks is not None:
    seen = jnp.minimum(length, sinks)
    sources.append(Source(*cache.sinks, seen, lambda at_T: at_T < seen))
  return attend_split(
    softmax,
    q_MxD,
    sources,
    layer,
    T=static.tile,
    scale=static.scale,
    split=program,
    num_splits=static.programs,
  )
