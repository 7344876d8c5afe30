"""Products with weights in 8 bits equal float64 products with the dequantized weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode import pack_rows
from pallas_kernels.quantized_product import quantized_product
from pallas_kernels.quantized_product.triton_product import quantized_product_triton
from pallas_kernels.quantized_product.xla import quantized_product_xla
from tests.pallas_kernels.h100 import compile_for_h100, lower_for_h100, needs_cuda_compiler
from tests.rounding import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

EPSILON = 1e-5


class Case(NamedTuple):
  """One call."""

  rows: int
  inputs: int = 192
  channels: int = 96
  stored: str = "int8"
  dtype: str = "float32"
  has_norm: bool = False
  has_residual: bool = False
  swiglu: bool = False

  def arrays(self) -> dict[str, jax.Array | None]:
    """Random rows and weights, whose channels have scales from 2⁻⁶ to 1."""
    keys = jax.random.split(jax.random.key(0), 5)
    exponent_T = jax.random.randint(keys[4], (self.channels, 1), -6, 1)
    weight = jax.random.normal(keys[0], (self.channels, self.inputs)) * 2.0**exponent_T
    numbers, scale = pack_rows(weight, self.stored)
    width = self.channels // 2 if self.swiglu else self.channels
    residual = jax.random.normal(keys[2], (self.rows, width), self.dtype)
    norm = 1 + 0.1 * jax.random.normal(keys[3], (self.inputs,))
    return {
      "x": jax.random.normal(keys[1], (self.rows, self.inputs), self.dtype),
      "numbers": numbers,
      "scale": scale,
      "norm_scale": norm if self.has_norm else None,
      "residual": residual if self.has_residual else None,
    }

  def call(self, function: Any, **options: Any) -> Callable[..., jax.Array]:
    """A function of the dict of arrays."""
    static = {"epsilon": EPSILON, "swiglu": self.swiglu, **options}
    return lambda arrays: function(
      arrays["x"],
      arrays["numbers"],
      arrays["scale"],
      norm_scale=arrays["norm_scale"],
      residual=arrays["residual"],
      **static,
    )


CASES = {
  "one_row": Case(1),
  "five_rows": Case(5, stored="float8_e4m3fn"),
  "sixteen_rows": Case(16, has_residual=True, dtype="bfloat16"),
  "seventeen_tiles_of_inputs": Case(2, inputs=1088, has_norm=True),
  "norm_and_swiglu": Case(1, has_norm=True, swiglu=True, dtype="bfloat16"),
  "norm_and_float8": Case(3, stored="float8_e4m3fn", has_norm=True, dtype="bfloat16"),
  "swiglu_of_many_rows": Case(6, has_norm=True, swiglu=True),
  "residual": Case(3, has_residual=True, stored="float8_e4m3fn"),
}
GPU_CASES = {
  "qkv": Case(1, 4096, 12288, dtype="bfloat16", has_norm=True),
  "gate_up": Case(4, 4096, 22016, "float8_e4m3fn", "bfloat16", has_norm=True, swiglu=True),
  "down": Case(1, 11008, 4096, dtype="bfloat16", has_residual=True),
  "sixteen_rows": Case(16, 11008, 4096, dtype="bfloat16", has_residual=True),
  "small": Case(2, 576, 3072, "float8_e4m3fn", "bfloat16", has_norm=True, swiglu=True),
  "float32": Case(8, 576, 960, dtype="float32", has_norm=True),
  "float16": Case(1, 576, 960, dtype="float16", has_norm=True),
}


def exact(case: Case) -> np.ndarray:
  """The result in float64 from the dequantized weights."""
  arrays = {
    name: None if x is None else np.asarray(x).astype(np.float64)
    for name, x in case.arrays().items()
  }
  row = arrays["x"]
  if arrays["norm_scale"] is not None:
    row = row / np.sqrt((row**2).mean(axis=1, keepdims=True) + EPSILON) * arrays["norm_scale"]
  out = row @ (arrays["numbers"] * arrays["scale"][:, None]).T
  if case.swiglu:
    gate, up = np.split(out, 2, axis=1)
    out = gate / (1 + np.exp(-gate)) * up
  return out if arrays["residual"] is None else out + arrays["residual"]


def plain(case: Case) -> jax.Array:
  """The result in the dtype of the rows from weights that are dequantized to this dtype."""
  arrays: Any = case.arrays()
  weight = arrays["numbers"].astype(jnp.float32) * arrays["scale"][:, None]
  dequantized = {"numbers": weight.astype(case.dtype), "scale": jnp.ones_like(arrays["scale"])}
  return case.call(quantized_product_xla)(arrays | dequantized)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_equals_the_product_with_dequantized_weights(name: str, backend: str):
  case = CASES[name]
  triton = case.call(quantized_product_triton, interpret=True)
  run = triton if backend == "triton" else case.call(quantized_product_xla)
  actual = jax.jit(run)(case.arrays())
  assert actual.dtype == case.dtype
  assert_close(actual, exact(case), terms=case.inputs, plain=plain(case), name=name)


def test_gpu_targets_read_the_weights_in_8_bits():
  case = GPU_CASES["qkv"]
  program = lower_for_h100(case.call(quantized_product), jax.eval_shape(case.arrays))
  operations = [line for line in program.splitlines() if "tensor<12288x4096x" in line]
  assert any("custom_call" in line for line in operations)
  # No operation outside of the kernel converts the weight.
  assert not [line for line in operations if "stablehlo.convert" in line]


@pytest.mark.parametrize("stored", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("has_norm", [True, False])
def test_normalised_rows_are_float16_for_numbers_of_float8(stored: str, has_norm: bool):
  case = Case(1, 4096, 128, stored, "bfloat16", has_norm=has_norm)
  program = lower_for_h100(case.call(quantized_product), jax.eval_shape(case.arrays))
  (kernel,) = [line for line in program.splitlines() if "custom_call" in line]
  is_float16 = "tensor<1x4096xf16>" in kernel
  assert is_float16 == (has_norm and stored == "float8_e4m3fn")
  assert is_float16 != ("tensor<1x4096xbf16>" in kernel)


@pytest.mark.parametrize(
  ("case", "reason"),
  [(Case(17), "17 rows"), (Case(1, inputs=200), "96 outputs and 200 inputs; 32 must divide")],
)
def test_other_shapes_run_in_xla(case: Case, reason: str):
  arrays = jax.eval_shape(case.arrays)
  assert "custom_call" not in lower_for_h100(case.call(quantized_product), arrays)
  with pytest.raises(NotImplementedError, match=reason):
    lower_for_h100(case.call(quantized_product, implementation="triton"), arrays)


@pytest.mark.parametrize("name", GPU_CASES)
@needs_cuda_compiler
def test_compiles_for_an_h100(name: str):
  case = GPU_CASES[name]
  compile_for_h100(case.call(quantized_product_triton), jax.eval_shape(case.arrays))


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_on_a_gpu(name: str):
  case = GPU_CASES[name]
  actual = jax.jit(case.call(quantized_product, implementation="triton"))(case.arrays())
  assert_close(actual, exact(case), terms=case.inputs, plain=plain(case), name=name)
