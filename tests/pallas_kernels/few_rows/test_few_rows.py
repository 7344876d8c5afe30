"""Products of few rows against jax.numpy: interpreted, compiled for an H100, and on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.few_rows import few_rows_refusal, Norm
from pallas_kernels.few_rows.triton_products import (
  add_product_triton,
  gated_product_triton,
  products_triton,
)
from tests.pallas_kernels.h100 import compile_for_h100, needs_cuda_compiler

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


def draw(B: int, E: int, F: int, dtype: str) -> dict[str, jax.Array]:
  rng = np.random.default_rng(0)
  shapes = {"x": (B, E), "a": (E, F), "b": (E, F), "c": (E, F // 2), "y": (B, F)}
  arrays = {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in shapes.items()}
  return {**arrays, "scale": jnp.asarray(rng.normal(size=E), jnp.float32)}


def kernels(arrays: dict[str, jax.Array], *, interpret: bool) -> tuple[jax.Array, ...]:
  """All that there is, of one set of arrays."""
  x, norm = arrays["x"], Norm(arrays["scale"], 1e-5)
  plain = products_triton(x, (arrays["a"], arrays["c"]), None, interpret=interpret)
  normed = products_triton(x, (arrays["a"], arrays["b"], arrays["c"]), norm, interpret=interpret)
  gated = gated_product_triton(x, arrays["a"], arrays["b"], norm, interpret=interpret)
  added = add_product_triton(arrays["y"], x, arrays["a"], interpret=interpret)
  return *plain, *normed, gated, added


def plain(arrays: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
  """The same in jax.numpy."""
  x, y = arrays["x"], arrays["y"]
  wide = x.astype(jnp.float32)
  factor = jax.lax.rsqrt((wide * wide).mean(axis=1) + 1e-5)[:, None]
  normed = (wide * factor * arrays["scale"][None]).astype(x.dtype)
  a, b, c = (arrays[name] for name in "abc")
  gated = jax.nn.silu(normed @ a) * (normed @ b)
  return x @ a, x @ c, normed @ a, normed @ b, normed @ c, gated, y + x @ a


def assert_as_exact_as_plain(got: tuple[jax.Array, ...], arrays: dict[str, jax.Array]) -> None:
  """Errors at most twice those of jax.numpy in the same dtype, both against float32."""
  rounded = plain(arrays)
  with jax.default_matmul_precision("highest"):
    exact = plain({name: x.astype(jnp.float32) for name, x in arrays.items()})
  for one, other, want in zip(got, rounded, exact, strict=True):
    norm = np.linalg.norm(want)
    allowed = 2 * np.linalg.norm(np.asarray(other, np.float32) - want) / norm
    error = np.linalg.norm(np.asarray(one, np.float32) - want) / norm
    assert error <= max(allowed, 1e-6)


@pytest.mark.parametrize(
  ("B", "E", "F", "dtype"),
  [(1, 256, 64, "float32"), (3, 96, 96, "bfloat16"), (17, 48, 32, "float32")],
)
def test_interpreted_kernels_equal_plain(B: int, E: int, F: int, dtype: str):
  arrays = draw(B, E, F, dtype)
  got = jax.jit(lambda arrays: kernels(arrays, interpret=True))(arrays)
  assert_as_exact_as_plain(got, arrays)


GPU_SHAPES = [(1, 4096, 11008, "bfloat16"), (24, 576, 1536, "bfloat16"), (64, 2048, 512, "float32")]


@needs_cuda_compiler
@pytest.mark.parametrize(("B", "E", "F", "dtype"), GPU_SHAPES)
def test_compiles_for_an_h100(B: int, E: int, F: int, dtype: str):
  shapes = jax.eval_shape(lambda: draw(B, E, F, dtype))
  compile_for_h100(lambda arrays: kernels(arrays, interpret=False), shapes)


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "E", "F", "dtype"), GPU_SHAPES)
def test_on_a_gpu(B: int, E: int, F: int, dtype: str):
  arrays = draw(B, E, F, dtype)
  run = jax.jit(lambda arrays: kernels(arrays, interpret=False))
  got = run(arrays)
  with jax.default_matmul_precision("highest"):
    assert_as_exact_as_plain(got, arrays)
  for one, again in zip(got, run(arrays), strict=True):
    np.testing.assert_array_equal(one, again)


def test_says_why_not():
  x, weight = jnp.zeros((2, 64)), jnp.zeros((64, 32))
  assert "Ampere" in str(few_rows_refusal(x, weight))
  assert "65 rows" in str(few_rows_refusal(jnp.zeros((65, 64)), weight))
  assert "bfloat16" in str(few_rows_refusal(x, weight.astype(jnp.bfloat16)))
  assert "[64, 40]" in str(few_rows_refusal(x, jnp.zeros((64, 40))))
