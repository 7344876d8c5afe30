"""RMSNorm with the residual sum in one kernel, lowered through Pallas-Triton.

A program computes one row, which it holds in registers. XLA takes three kernels: the sum, the mean
of the squares, and the product. Each takes longer to start than to run when there are few rows.

Letters: W channels, rounded up to a power of two; E of them exist.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.kernel_common import out_struct
from pallas_kernels.rms_norm.equation import rms_norm_xla
from pallas_kernels.triton_common import padded_slice

_CHANNELS_OF_WARP = 512  # A thread holds 16 channels: two loads of 16 bytes in bfloat16.
_MOST_WARPS = 16


def rms_norm_triton(
  x: Array,
  scale_E: Array,
  *,
  epsilon: float,
  update: Array | None = None,
  interpret: bool = False,
) -> tuple[Array, Array]:
  """See `rms_norm`. The gradient is that of the XLA implementation."""
  return _with_gradient(epsilon, interpret, x, scale_E, update)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_gradient(
  epsilon: float, interpret: bool, x: Array, scale_E: Array, update: Array | None
) -> tuple[Array, Array]:
  E = x.shape[-1]
  rows = [y.reshape(-1, E) for y in (x, update) if y is not None]
  W, row = pl.next_power_of_2(E), pl.BlockSpec((None, E), lambda b: (b, 0))
  results = pl.pallas_call(
    functools.partial(_kernel, epsilon=epsilon),
    grid=(len(rows[0]),),
    in_specs=[pl.BlockSpec((E,), lambda b: (0,)), *(row for _ in rows)],
    out_specs=[row for _ in rows],
    out_shape=[out_struct(x, y.shape, x.dtype) for y in rows],
    compiler_params=plgpu.CompilerParams(
      num_warps=min(_MOST_WARPS, max(1, W // _CHANNELS_OF_WARP)), num_stages=1
    ),
    interpret=interpret,
    name="rms_norm",
  )(scale_E, *rows)
  normed, *sums = (y.reshape(x.shape) for y in results)
  return sums[0] if sums else x, normed


def _forward(
  epsilon: float, interpret: bool, x: Array, scale_E: Array, update: Array | None
) -> tuple[tuple[Array, Array], Any]:
  return _with_gradient(epsilon, interpret, x, scale_E, update), (x, scale_E, update)


def _backward(epsilon: float, interpret: bool, saved: Any, gradients: tuple[Array, Array]) -> Any:
  del interpret

  def function(x: Array, scale_E: Array, update: Array | None) -> tuple[Array, Array]:
    return rms_norm_xla(x, scale_E, epsilon=epsilon, update=update)

  return jax.vjp(function, *saved)[1](gradients)


_with_gradient.defvjp(_forward, _backward)


def _kernel(scale_ref: Any, *refs: Any, epsilon: float) -> None:
  """The references after `scale_ref`: x, or x and update; then the norm, or the norm and y."""
  (E,), inputs = scale_ref.shape, len(refs) // 2
  W = pl.next_power_of_2(E)
  at, exists_W = padded_slice(0, W), None if W == E else jnp.arange(W) < E

  def load(ref: Any) -> Array:
    other = None if exists_W is None else 0
    return plgpu.load(ref.at[at], mask=exists_W, other=other).astype(jnp.float32)

  # All loads precede the sum over the row, whose barriers would delay a load after them.
  y_W, *update = [load(ref) for ref in refs[:inputs]]
  scale_W = load(scale_ref)
  out_ref, *sum_refs = refs[inputs:]
  if sum_refs:
    rounded_W = (y_W + update[0]).astype(out_ref.dtype)
    plgpu.store(sum_refs[0].at[at], rounded_W, mask=exists_W)
    y_W = rounded_W.astype(jnp.float32)
  inverse = lax.rsqrt((y_W * y_W).sum() / E + epsilon)
  plgpu.store(out_ref.at[at], (y_W * (inverse * scale_W)).astype(out_ref.dtype), mask=exists_W)
