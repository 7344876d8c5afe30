"""The three products of a decoder layer, each with what comes before and after it."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import DTypeLike, Float

from pallas_kernels.target import choose

_MOST_ROWS = 64  # more are worth a tiled product's effort
_LEAST = 16  # of a side of a matrix product


class Norm(NamedTuple):
  """RMSNorm of the rows before they are multiplied: x/√(mean x² + ε) · scale."""

  scale: Float[Array, "E"]
  epsilon: float


def products(
  rows: Float[Array, "B E"],
  weights: Sequence[Float[Array, "E _"]],
  norm: Norm | None = None,
  *,
  dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "B _"], ...]:
  """norm(rows) · W for each of some weights, which need not be equally wide.

  Sums are float32. Results have `dtype`, by default the rows'. Only where `few_rows_refusal` gives
  None.
  """
  from pallas_kernels.few_rows.triton_products import products_triton

  return products_triton(rows, tuple(weights), norm, dtype=dtype)


def gated_product(
  rows: Float[Array, "B E"], gate: Float[Array, "E F"], up: Float[Array, "E F"], norm: Norm
) -> Float[Array, "B F"]:
  """SwiGLU (Shazeer, arXiv 2002.05202): silu(x · gate) ⊙ (x · up) with x = norm(rows)."""
  from pallas_kernels.few_rows.triton_products import gated_product_triton

  return gated_product_triton(rows, gate, up, norm)


def add_product(
  residual: Float[Array, "B F"], rows: Float[Array, "B E"], weight: Float[Array, "E F"]
) -> Float[Array, "B F"]:
  """residual + rows · weight."""
  from pallas_kernels.few_rows.triton_products import add_product_triton

  return add_product_triton(residual, rows, weight)


def few_rows_refusal(rows: Array, *weights: Array) -> str | None:
  """Why these functions do not serve the device at hand or such arrays; None where they do."""
  reason = _refusal(rows, weights)
  if reason is None and choose(None, {"triton": None}, rows) != "triton":
    reason = "the kernels run on an Ampere or newer GPU"
  return reason


def _refusal(rows: Array, weights: Sequence[Array]) -> str | None:
  if rows.shape[0] > _MOST_ROWS:
    return f"there are {rows.shape[0]} rows; these kernels take {_MOST_ROWS}"
  if rows.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
    return f"dtype is {rows.dtype}; these kernels have float16, bfloat16 and float32"
  for weight in weights:
    if weight.dtype != rows.dtype:
      return f"a weight is {weight.dtype} and the rows are {rows.dtype}"
    if weight.shape[0] % _LEAST or weight.shape[1] % _LEAST:
      return f"a weight is {list(weight.shape)}; its sides must be multiples of {_LEAST}"
  return None
