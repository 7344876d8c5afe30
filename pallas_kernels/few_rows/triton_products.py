"""Products of a few rows, lowered through Pallas-Triton: a weight is read once, and nothing else.

With so few rows a product takes the time in which its weight is read. A program multiplies all rows
with some columns of a weight, over its whole depth. RMSNorm needs no pass of its own: its factor
is one number a row, which is summed up beside the product and multiplied in at the end.

Letters: M rows, rounded up; K tile of the depth E; F tile of a weight's columns.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.few_rows.api import Norm
from pallas_kernels.triton_common import dot, like

_LEAST = 16  # of a side of a matrix product
_STAGE_BYTES = 100 * 2**10  # of shared memory: two programs share an SM


class Tile(NamedTuple):
  """Of a weight, and how a program works on it."""

  depth: int = 128
  columns: int = 32
  num_warps: int = 4
  num_stages: int = 6

  def fit(self, rows: Array, *weights: Array) -> "Tile":
    """The same, in sizes that divide the weights', and with the stages that fit."""
    depth, columns = (
      _divisor(size, most)
      for size, most in zip(weights[0].shape, (self.depth, self.columns), strict=True)
    )
    height = max(_LEAST, pl.next_power_of_2(rows.shape[0]))
    stage = depth * (height + columns * len(weights)) * rows.dtype.itemsize
    stages = max(1, min(self.num_stages, _STAGE_BYTES // stage))
    return self._replace(depth=depth, columns=columns, num_stages=stages)


def _divisor(size: int, most: int) -> int:
  while size % most:
    most //= 2
  return most


def products_triton(
  rows: Array,
  weights: tuple[Array, ...],
  norm: Norm | None,
  *,
  dtype: Any = None,
  tile: Tile | None = None,
  interpret: bool = False,
) -> tuple[Array, ...]:
  """See `products`."""
  tiles = [(tile or Tile()).fit(rows, weight) for weight in weights]
  counts = [w.shape[1] // t.columns for w, t in zip(weights, tiles, strict=True)]
  firsts = [sum(counts[:i]) for i in range(len(counts))]

  def kernel(x_ref: Any, scale_ref: Any, w_refs: Any, *out_refs: Any) -> None:
    number = pl.program_id(0)
    for w_ref, out_ref, t, first, count in zip(
      w_refs, out_refs, tiles, firsts, counts, strict=True
    ):

      @pl.when((number >= first) & (number < first + count))
      def _(w_ref: Any = w_ref, out_ref: Any = out_ref, t: Tile = t, first: int = first) -> None:
        column = (number - first) * t.columns
        (acc,) = _multiply(x_ref, scale_ref, [w_ref], column, t, norm)
        _store(out_ref, column, acc)

  shapes = [like(rows, (rows.shape[0], w.shape[1]), dtype or rows.dtype) for w in weights]
  return _call(kernel, sum(counts), tiles[0], rows, norm, weights, shapes, interpret=interpret)


def gated_product_triton(
  rows: Array,
  gate: Array,
  up: Array,
  norm: Norm,
  *,
  tile: Tile | None = None,
  interpret: bool = False,
) -> Array:
  """See `gated_product`."""
  t = (tile or Tile()).fit(rows, gate, up)

  def kernel(x_ref: Any, scale_ref: Any, w_refs: Any, out_ref: Any) -> None:
    column = pl.program_id(0) * t.columns
    gate_MxF, up_MxF = _multiply(x_ref, scale_ref, w_refs, column, t, norm)
    # As it is where products are rounded before they are used.
    gate_MxF, up_MxF = (x.astype(out_ref.dtype).astype(jnp.float32) for x in (gate_MxF, up_MxF))
    _store(out_ref, column, gate_MxF / (1 + jnp.exp(-gate_MxF)) * up_MxF)

  count = gate.shape[1] // t.columns
  shape = like(rows, (rows.shape[0], gate.shape[1]), rows.dtype)
  (out,) = _call(kernel, count, t, rows, norm, (gate, up), [shape], interpret=interpret)
  return out


def add_product_triton(
  residual: Array,
  rows: Array,
  weight: Array,
  *,
  tile: Tile | None = None,
  interpret: bool = False,
) -> Array:
  """See `add_product`."""
  t = (tile or Tile()).fit(rows, weight)

  def kernel(x_ref: Any, residual_ref: Any, w_refs: Any, out_ref: Any) -> None:
    column = pl.program_id(0) * t.columns
    (acc_MxF,) = _multiply(x_ref, None, w_refs, column, t, None)
    at, mask_MxF = _part(residual_ref, 0, acc_MxF.shape[0], column, t.columns)
    before_MxF = plgpu.load(at, mask=mask_MxF, other=0).astype(jnp.float32)
    _store(out_ref, column, before_MxF + acc_MxF.astype(out_ref.dtype).astype(jnp.float32))

  count = weight.shape[1] // t.columns
  shape = like(rows, residual.shape, residual.dtype)
  (out,) = _call(kernel, count, t, rows, residual, (weight,), [shape], interpret=interpret)
  return out


def _call(
  kernel: Callable[..., None],
  programs: int,
  tile: Tile,
  rows: Array,
  beside: Norm | Array | None,
  weights: Sequence[Array],
  shapes: Sequence[Any],
  *,
  interpret: bool,
) -> tuple[Array, ...]:
  """Runs a kernel on whole arrays: the rows, what comes beside them, and the weights."""
  beside = beside.scale if isinstance(beside, Norm) else beside
  given = [rows, *([] if beside is None else [beside]), *weights]

  def with_all(*refs: Any) -> None:
    x_ref, *beside_ref = refs[: len(given) - len(weights)]
    w_refs, out_refs = refs[len(given) - len(weights) : len(given)], refs[len(given) :]
    kernel(x_ref, beside_ref[0] if beside_ref else None, w_refs, *out_refs)

  out: list[Array] = pl.pallas_call(
    with_all,
    grid=(programs,),
    out_shape=list(shapes),
    compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
    interpret=interpret,
    name="few_rows",
  )(*given)
  return tuple(out)


def _multiply(
  x_ref: Any, scale_ref: Any, w_refs: Any, column: Array, tile: Tile, norm: Norm | None
) -> tuple[Array, ...]:
  """Some columns of norm(rows) · weight for each weight, in float32."""
  rows, depth = x_ref.shape
  M, K = max(_LEAST, pl.next_power_of_2(rows)), tile.depth

  def step(k: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
    accs, squares_M = carry
    at, mask_MxK = _part(x_ref, 0, M, k * K, K)
    x_MxK = plgpu.load(at, mask=mask_MxK, other=0)
    if norm is not None:
      wide_MxK = x_MxK.astype(jnp.float32)
      squares_M += (wide_MxK * wide_MxK).sum(axis=1)
      x_MxK = (wide_MxK * scale_ref[pl.ds(k * K, K)].astype(jnp.float32)[None]).astype(x_MxK.dtype)
    accs = tuple(
      acc + dot(x_MxK, w_ref[pl.ds(k * K, K), pl.ds(column, tile.columns)])
      for acc, w_ref in zip(accs, w_refs, strict=True)
    )
    return accs, squares_M

  zero = jnp.zeros((M, tile.columns), jnp.float32)
  begin = (tuple(zero for _ in w_refs), jnp.zeros((M,), jnp.float32))
  accs, squares_M = lax.fori_loop(0, depth // K, step, begin)
  if norm is None:
    return accs
  factor_M = lax.rsqrt(squares_M / depth + norm.epsilon)
  return tuple(acc * factor_M[:, None] for acc in accs)


def _part(ref: Any, first: int, rows: int, column: Array, columns: int) -> tuple[Any, Array]:
  """A tile of a reference of fewer rows than that, and which of its elements exist."""
  at = ref.at[pl.ds(first, rows), pl.ds(column, columns)]
  mask = (first + jnp.arange(rows) < ref.shape[0])[:, None]
  return at, jnp.broadcast_to(mask, (rows, columns))


def _store(out_ref: Any, column: Array, x_MxF: Array) -> None:
  at, mask_MxF = _part(out_ref, 0, x_MxF.shape[0], column, x_MxF.shape[1])
  plgpu.store(at, x_MxF.astype(out_ref.dtype), mask=mask_MxF)
