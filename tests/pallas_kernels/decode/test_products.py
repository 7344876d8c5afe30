"""The fused products of decoding equal their equations in float64, in XLA and in Triton."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode import products
from pallas_kernels.decode import triton_products as triton
from pallas_kernels.decode import xla_products as xla
from pallas_kernels.decode.products import NormInput
from tests.pallas_kernels.h100 import (
  abstract_mesh,
  compile_for_h100,
  lower_for_h100,
  needs_cuda_compiler,
)
from tests.rounding import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

EPSILON = 1e-5
OPS = ("add_product", "normed_swiglu", "normed_qkv")


class Case(NamedTuple):
  """Sizes of a layer."""

  rows: int
  embed: int
  mlp: int
  heads: int
  kv_heads: int
  head_dim: int
  dtype: str = "float32"

  def arguments(self, op: str) -> tuple[list[Any], dict[str, float]]:
    """Random arguments of an op. Rows of x have different sizes, so that the norm matters."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    B, E, F, C = self.rows, self.embed, self.mlp, self.head_dim // 2

    def normal(*shape: int) -> jax.Array:
      return jax.random.normal(next(keys), shape)

    def weight(rows: int, columns: int) -> jax.Array:
      return (normal(rows, columns) / rows**0.5).astype(self.dtype)

    x = (normal(B, E) * 4.0 ** -(jnp.arange(B)[:, None] % 4)).astype(self.dtype)
    scale = 1 + 0.1 * normal(E)
    if op == "add_product":
      return [x, normal(B, F).astype(self.dtype), weight(F, E), scale], {}
    normed = products.norm_input(x, scale)
    # The same sums in two parts.
    normed = normed._replace(squares=jnp.concatenate([normed.squares / 4, 3 * normed.squares / 4]))
    if op == "normed_swiglu":
      return [normed, weight(E, F), weight(E, F)], {"epsilon": EPSILON}
    widths = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
    angle = 3 * normal(B, C)
    arrays = [normed, *(weight(E, n) for n in widths), jnp.cos(angle), jnp.sin(angle)]
    return arrays, {"epsilon": EPSILON}


def exact(op: str, arrays: list[Any]) -> list[np.ndarray]:
  """The equations of `products` in float64."""
  x, *rest = jax.tree.map(lambda array: np.asarray(array).astype(np.float64), arrays)
  if op == "add_product":
    total = x + rest[0] @ rest[1]
    return [total, total * rest[2][None], np.sum(total * total, axis=1)]
  y = x.scaled / np.sqrt(x.squares.sum(axis=0) / x.scaled.shape[1] + EPSILON)[:, None]
  if op == "normed_swiglu":
    gate, up = y @ rest[0], y @ rest[1]
    return [gate / (1 + np.exp(-gate)) * up]
  *weights, cos, sin = rest
  outs = []
  for weight in weights[:2]:
    first, second = np.split((y @ weight).reshape(len(y), -1, 2 * cos.shape[1]), 2, axis=-1)
    turned = (first + 1j * second) * (cos + 1j * sin)[:, None]
    outs.append(np.concatenate([turned.real, turned.imag], axis=-1).reshape(len(y), -1))
  return [*outs, y @ weights[2]]


def check(case: Case, op: str, run: Any) -> None:
  arrays, options = case.arguments(op)
  got = jax.jit(functools.partial(run, **options))(*arrays)
  plain = getattr(xla, f"{op}_xla")(*arrays, **options)
  terms = max(case.embed, case.mlp)
  for want, one, other in zip(exact(op, arrays), _leaves(got), _leaves(plain), strict=True):
    assert one.dtype == other.dtype
    assert_close(one, want, terms=terms, plain=other, name=op)


def _leaves(result: Any) -> list[jax.Array]:
  """The arrays of a result, with the parts of the sums of squares added."""
  leaves = jax.tree.leaves(result)
  return [*leaves[:-1], leaves[-1].sum(axis=0)] if isinstance(result[-1], NormInput) else leaves


CASES = {
  "one_row": Case(1, 64, 96, 2, 1, 32),
  "five_rows": Case(5, 128, 64, 3, 3, 32),
  "bfloat16": Case(2, 64, 192, 4, 2, 64, "bfloat16"),
  "more_rows_than_a_product_needs": Case(17, 32, 32, 1, 1, 32),
}
GPU_CASES = {
  "7b": Case(1, 4096, 11008, 32, 32, 128, "bfloat16"),
  "7b_four_rows": Case(4, 4096, 11008, 32, 32, 128, "bfloat16"),
  "smollm2": Case(16, 576, 1536, 9, 3, 64, "bfloat16"),
  "full_precision": Case(2, 256, 512, 2, 1, 64),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", CASES)
def test_interpreted_products_equal_float64(name: str, op: str):
  check(CASES[name], op, functools.partial(getattr(triton, f"{op}_triton"), interpret=True))


@pytest.mark.parametrize("op", OPS)
def test_xla_equals_float64(op: str):
  case = CASES["five_rows"]
  arrays, options = case.arguments(op)
  got = getattr(products, op)(*arrays, implementation="xla", **options)
  for one, want in zip(_leaves(got), exact(op, arrays), strict=True):
    assert_close(one, want, terms=128, name=op)


@pytest.mark.parametrize("op", OPS)
def test_gpu_targets_use_the_kernels_and_reports_name_the_reason(op: str):
  arrays, options = GPU_CASES["7b"].arguments(op)
  run = functools.partial(getattr(products, op), **options)
  assert f"decode_{op}" in lower_for_h100(run, *arrays)
  for case, reason in (
    (Case(1, 4104, 4104, 1, 1, 24), r"sizes are \[.*4104.*\]; 16 must divide them"),
    (Case(2, 4096, 32, 1, 1, 32), "there are 2 rows; XLA is faster above 1"),
    (Case(1, 32, 32, 1, 1, 32), "the width is 32; the kernels are for 4096 and more"),
    (Case(1, 4096, 32, 1, 1, 32, "float16"), "dtype is float16; it must be bfloat16 or float32"),
  ):
    odd, options = case.arguments(op)
    named = functools.partial(getattr(products, op), implementation="triton", **options)
    with (
      jax.sharding.use_abstract_mesh(abstract_mesh()),
      pytest.raises(NotImplementedError, match=reason),
    ):
      jax.eval_shape(named, *odd)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", GPU_CASES)
@needs_cuda_compiler
def test_compiles_for_an_h100(name: str, op: str):
  arrays, options = GPU_CASES[name].arguments(op)
  compile_for_h100(functools.partial(getattr(triton, f"{op}_triton"), **options), *arrays)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", GPU_CASES)
def test_on_a_gpu(name: str, op: str):
  with jax.default_matmul_precision("highest"):
    check(GPU_CASES[name], op, getattr(triton, f"{op}_triton"))
