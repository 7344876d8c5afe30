"""The second kernel of a decoding step: the softmaxes of all programs as one."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode.triton_tile import load_rows, MASK_VALUE
from pallas_kernels.kernel_common import out_struct


def join(
  query: Array, parts: list[Array], length: Array, layer: Array, *, interpret: bool
) -> tuple[Array, Array]:
  """The output [B, H, D] of the parts [B, H, P, ...], and the layer's lengths, one longer."""
  B, H, D = query.shape
  P = parts[0].shape[2]
  of_part = [
    pl.BlockSpec((None, None, P, *x.shape[3:]), lambda h, b, r=x.ndim - 3: (b, h, 0, *[0] * r))
    for x in parts
  ]
  lengths = pl.BlockSpec(length.shape, lambda h, b: (0, 0))
  joined: tuple[Array, Array] = pl.pallas_call(
    _join_kernel,
    grid=(H, B),
    in_specs=[pl.BlockSpec((1,), lambda h, b: (0,)), lengths, *of_part],
    out_specs=[pl.BlockSpec((None, None, D), lambda h, b: (b, h, 0)), lengths],
    out_shape=[
      out_struct(query, query.shape, query.dtype),
      out_struct(length, length.shape, length.dtype),
    ],
    input_output_aliases={1: 1},
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="decode_join",
  )(layer, length, *parts)
  return joined


def _join_kernel(
  layer_ref: Any,
  length_ref: Any,
  sum_ref: Any,
  top_ref: Any,
  total_ref: Any,
  out_ref: Any,
  new_length_ref: Any,
) -> None:
  head, b, P = pl.program_id(0), pl.program_id(1), top_ref.shape[0]
  Q = pl.next_power_of_2(P)
  rows, real_Q = pl.ds(0, Q), jnp.arange(Q) < P
  top_Q = plgpu.load(top_ref.at[rows], mask=real_Q, other=MASK_VALUE)
  total_Q = plgpu.load(total_ref.at[rows], mask=real_Q, other=0)
  sum_QxD = load_rows(sum_ref, (), 0, Q, P)
  fade_Q = jnp.exp(top_Q - top_Q.max())
  total = (fade_Q * total_Q).sum()
  out_D = (fade_Q[:, None] * sum_QxD).sum(axis=0) / jnp.where(total == 0, 1.0, total)
  out_ref[...] = out_D.astype(out_ref.dtype)

  @pl.when(head == 0)
  def _() -> None:
    layer = layer_ref[0]
    new_length_ref[layer, b] = length_ref[layer, b] + 1
