"""The second kernel of a decoding step: combines the softmaxes of all splits into the output."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode.triton_tile import load_rows, OnlineSoftmax
from pallas_kernels.kernel_common import MASK_VALUE, out_struct
from pallas_kernels.triton_common import padded_slice


def combine(
  query: Array,
  splits: OnlineSoftmax,
  lengths: Sequence[Array],
  layer: Array,
  *,
  num_splits: Callable[[Array], Array] | None = None,
  interpret: bool,
) -> tuple[Array, list[Array]]:
  """Combines the splits, and counts the new token.

  With split p's weighted sum acc_p, largest logit m_p and sum of weights l_p, m = max_p m_p and
  α_p = exp(m_p − m): out = Σ_p α_p acc_p / Σ_p α_p l_p.

  Args:
    query: [B, H, D]; the output has its shape and dtype.
    splits: acc [B, H, P, D], m [B, H, P] and l [B, H, P] of P splits, float32.
    lengths: [layers, B], before the new token; one array or several equal ones.
    layer: [1], the layer of the splits.
    num_splits: query head to the number of its splits, the first ones; None where all have P.
    interpret: whether to interpret the kernel on the CPU.

  Returns:
    The output [B, H, D], and every array of lengths with one more token in this layer.
  """
  B, H, D = query.shape
  P = splits.m.shape[2]
  split_specs = [
    pl.BlockSpec((None, None, P, *x.shape[3:]), lambda h, b, r=x.ndim - 3: (b, h, 0, *[0] * r))
    for x in splits
  ]
  length_specs = [pl.BlockSpec(length.shape, lambda h, b: (0, 0)) for length in lengths]
  out, *counted = pl.pallas_call(
    functools.partial(_combine_kernel, num_lengths=len(lengths), num_splits=num_splits),
    grid=(H, B),
    in_specs=[pl.BlockSpec((1,), lambda h, b: (0,)), *split_specs, *length_specs],
    out_specs=[pl.BlockSpec((None, None, D), lambda h, b: (b, h, 0)), *length_specs],
    out_shape=[
      out_struct(query, query.shape, query.dtype),
      *(out_struct(x, x.shape, x.dtype) for x in lengths),
    ],
    input_output_aliases={1 + len(splits) + i: 1 + i for i in range(len(lengths))},
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="decode_combine",
  )(layer, *splits, *lengths)
  return out, counted


def _combine_kernel(
  layer_ref: Any,
  acc_ref: Any,
  m_ref: Any,
  l_ref: Any,
  *refs: Any,
  num_lengths: int,
  num_splits: Callable[[Array], Array] | None,
) -> None:
  length_refs, out_ref, new_refs = refs[:num_lengths], refs[num_lengths], refs[num_lengths + 1 :]
  head, b, P = pl.program_id(0), pl.program_id(1), m_ref.shape[0]
  Q, splits = pl.next_power_of_2(P), P if num_splits is None else num_splits(head)
  rows, exists_Q = padded_slice(0, Q), jnp.arange(Q) < splits
  m_Q = plgpu.load(m_ref.at[rows], mask=exists_Q, other=MASK_VALUE)
  l_Q = plgpu.load(l_ref.at[rows], mask=exists_Q, other=0)
  acc_QxD = load_rows(acc_ref, (), 0, Q, splits)
  alpha_Q = jnp.exp(m_Q - m_Q.max())
  total = (alpha_Q * l_Q).sum()
  out_D = (alpha_Q[:, None] * acc_QxD).sum(axis=0) / jnp.where(total == 0, 1.0, total)
  out_ref[...] = out_D.astype(out_ref.dtype)

  @pl.when(head == 0)
  def _() -> None:
    layer = layer_ref[0]
    for length_ref, new_ref in zip(length_refs, new_refs, strict=True):
      new_ref[layer, b] = length_ref[layer, b] + 1
