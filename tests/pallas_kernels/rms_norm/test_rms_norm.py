"""RMSNorm with the residual sum equals float64 arithmetic on the rounded sum."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rms_norm.equation import rms_norm_xla
from pallas_kernels.rms_norm.triton_rms_norm import rms_norm_triton
from tests.pallas_kernels.h100 import compile_for_h100, lower_for_h100, needs_cuda_compiler
from tests.rounding import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

EPSILON = 1e-5


class Case(NamedTuple):
  """One call."""

  shape: tuple[int, ...]
  dtype: str = "float32"
  has_update: bool = True

  def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """x, the scale of each channel and the update; rows of x have sizes from 2⁻⁶ to 2⁶."""
    keys = jax.random.split(jax.random.key(0), 4)
    exponent = jax.random.randint(keys[3], (*self.shape[:-1], 1), -6, 7)
    x = jax.random.normal(keys[0], self.shape) * 2.0**exponent
    scale_E = 1 + 0.1 * jax.random.normal(keys[1], self.shape[-1:])
    update = jax.random.normal(keys[2], self.shape, self.dtype) if self.has_update else None
    return x.astype(self.dtype), scale_E, update


CASES = {
  "one_row": Case((1, 1, 256)),
  "no_update": Case((3, 192), has_update=False),
  "width_is_no_power_of_two": Case((2, 1, 192), dtype="bfloat16"),
  "sixty_four_rows": Case((4, 16, 64), dtype="float16"),
}
GPU_CASES = {
  "llama": Case((1, 1, 4096), dtype="bfloat16"),
  "batch": Case((4, 1, 4096), dtype="bfloat16"),
  "first_layer": Case((2, 1, 4096), dtype="bfloat16", has_update=False),
  "smollm2": Case((3, 1, 576), dtype="bfloat16"),
  "widest": Case((64, 16384), dtype="float32"),
  "float16": Case((5, 2048), dtype="float16"),
}


def run(function: Any, **options: Any) -> Any:
  """A function of `Case.arrays`, which takes the other options."""
  return lambda x, scale, update: function(x, scale, epsilon=EPSILON, update=update, **options)


def check(case: Case, found: tuple[jax.Array, jax.Array], name: str) -> None:
  """Compares a result with sums that are rounded once and with norms in float64."""
  x, scale_E, update = case.arrays()
  sum_found, normed = found
  sum_expected = x if update is None else x + update
  assert sum_found.dtype == normed.dtype == case.dtype
  np.testing.assert_array_equal(sum_found, sum_expected)
  wide = np.asarray(sum_expected).astype(np.float64)
  exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPSILON) * np.asarray(scale_E)
  plain = run(rms_norm_xla)(*case.arrays())[1]
  assert_close(normed, exact, terms=case.shape[-1], plain=plain, name=name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_equals_float64(name: str, backend: str):
  case = CASES[name]
  function = run(rms_norm_xla) if backend == "xla" else run(rms_norm_triton, interpret=True)
  check(case, jax.jit(function)(*case.arrays()), name)


@pytest.mark.parametrize("name", ["one_row", "no_update"])
def test_the_gradients_are_those_of_xla(name: str):
  case = CASES[name]
  arrays = case.arrays()
  weights = [jax.random.normal(jax.random.key(7 + i), case.shape) for i in range(2)]

  def gradients(function: Any) -> Any:
    def loss(*arrays: Any) -> jax.Array:
      return sum(((y * w).sum() for y, w in zip(function(*arrays), weights, strict=True)), 0.0)

    return jax.grad(loss, argnums=(0, 1, 2) if case.has_update else (0, 1))(*arrays)

  found, expected = (
    gradients(function) for function in (run(rms_norm_triton, interpret=True), run(rms_norm_xla))
  )
  for ours, theirs in zip(found, expected, strict=True):
    assert np.abs(theirs).max() > 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_gpu_targets_run_one_kernel():
  program = lower_for_h100(run(rms_norm), *jax.eval_shape(GPU_CASES["llama"].arrays))
  assert program.count("custom_call") == 1
  assert "stablehlo.reduce" not in program
  assert "stablehlo.add" not in program


@pytest.mark.parametrize(
  ("case", "devices", "reason"),
  [
    (Case((65, 64)), 1, "65 rows"),
    (Case((1, 32768)), 1, "32768 channels"),
    (Case((1, 64)), 2, "several devices"),
  ],
)
def test_other_calls_run_in_xla(case: Case, devices: int, reason: str):
  arrays = jax.eval_shape(case.arrays)
  assert "custom_call" not in lower_for_h100(run(rms_norm), *arrays, devices=devices)
  with pytest.raises(NotImplementedError, match=reason):
    lower_for_h100(run(rms_norm, implementation="triton"), *arrays, devices=devices)


@pytest.mark.parametrize("name", GPU_CASES)
@needs_cuda_compiler
def test_compiles_for_an_h100(name: str):
  compile_for_h100(run(rms_norm_triton), *jax.eval_shape(GPU_CASES[name].arrays))


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_on_a_gpu(name: str):
  case = GPU_CASES[name]
  check(case, jax.jit(run(rms_norm, implementation="triton"))(*case.arrays()), name)
