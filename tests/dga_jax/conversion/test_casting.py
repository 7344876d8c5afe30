"""Casts of weights: an overflow is an error with the tensor's name, and underflows are counted."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dga_jax.conversion.casting import cast, CastReport
from dga_jax.conversion.errors import ConversionError
from tests.dga_jax.conversion.folders import copy_of, import_folder, tensors


@pytest.mark.parametrize(
  ("value", "dtype", "holds"),
  [
    (65504.0, "float16", True),
    (65519.0, "float16", True),  # Rounds to 65504.
    (65520.0, "float16", False),  # Rounds to infinity.
    (-1e5, "float16", False),
    (3.38e38, "bfloat16", True),
    (3.4e38, "bfloat16", False),
    (3.4e38, "float32", True),
  ],
)
def test_values_within_the_range_of_a_dtype_are_accepted(
  value: float, dtype: str, holds: bool
) -> None:
  array = np.array([0.5, value, -1.0], np.float32)
  for stored, computed in ((dtype, dtype), (dtype, "float32"), ("float32", dtype)):
    if holds:
      got = cast(array, stored, computed, what="w", report=CastReport())
      np.testing.assert_array_equal(got, array.astype(jnp.dtype(stored)))
      assert np.isfinite(got).all()
      continue
    with pytest.raises(ConversionError, match=rf"w holds numbers up to .*, which {dtype} cannot"):
      cast(array, stored, computed, what="w", report=CastReport())


def test_small_numbers_are_rounded_as_float16_rounds_them() -> None:
  """2^-24 is the smallest subnormal number, and 2^-25 is halfway between it and 0."""
  array = np.array([2.0**-24, 1.5 * 2.0**-25, 2.0**-25, 1e-9, -1e-9, 0.0, 2.0**-14], np.float32)
  report = CastReport()
  got = cast(array, "float16", "float16", what="w", report=report)
  assert got.tolist() == [2.0**-24, 2.0**-24, 0.0, 0.0, 0.0, 0.0, 2.0**-14]
  assert (report.zeroed, report.total) == (3, 7)
  assert "3 of 7 weights are so small that they are 0 in float16" in report.summary("float16")
  cast(array, "float32", "float32", what="w", report=report)
  assert report.zeroed == 3
  assert CastReport().summary("float16") == ""


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_non_finite_numbers_are_errors(value: float, dtype: str) -> None:
  array = np.array([1.0, value], jnp.dtype(dtype))
  with pytest.raises(ConversionError, match="w holds 1 numbers that are not finite"):
    cast(array, dtype, dtype, what="w", report=CastReport())


def test_an_import_error_names_the_tensor(tmp_path: Path) -> None:
  folder = copy_of("smollm", tmp_path)
  content = tensors(folder)
  name = "model.layers.1.mlp.down_proj.weight"
  large = content[name].copy()
  large[3, 4] = 1e5
  save_file(content | {name: large}, folder / "model.safetensors")
  import_folder(folder, tmp_path / "run")
  with pytest.raises(
    ConversionError, match=rf"smollm: the tensor {name} holds numbers up to 99840"
  ):
    import_folder(folder, tmp_path / "half", param_dtype="float16", dtype="float16")
  with pytest.raises(ConversionError, match="which float16 cannot hold"):
    import_folder(folder, tmp_path / "half", param_dtype="float32", dtype="float16")
  large[3, 4] = 1e-9
  save_file(content | {name: large}, folder / "model.safetensors")
  said = import_folder(folder, tmp_path / "small", param_dtype="float16", dtype="float16")
  assert " 1 of " in said
  large[3, 4] = np.nan
  save_file(content | {name: large}, folder / "model.safetensors")
  with pytest.raises(ConversionError, match=f"{name} holds 1 numbers that are not finite"):
    import_folder(folder, tmp_path / "nan")
