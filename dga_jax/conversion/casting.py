"""Casts of weights that lose no number in silence."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from dga_jax.conversion.errors import ConversionError


@dataclasses.dataclass
class CastReport:
  """What the casts of an import changed.

  A cast rounds to the nearest number of the new dtype, its subnormal numbers included. A number
  whose magnitude is at most half of the smallest subnormal number, 3e-8 in float16, becomes 0. The
  sum of such changes in a product is as small as rounding errors, so they are counted and not
  refused.

  Attributes:
    zeroed: numbers other than 0 that became 0.
    total: numbers that were cast.
  """

  zeroed: int = 0
  total: int = 0

  def summary(self, dtype: str) -> str:
    """A sentence about the numbers that became 0; empty where there are none."""
    if not self.zeroed:
      return ""
    return f" {self.zeroed} of {self.total} weights are so small that they are 0 in {dtype}."


def cast(
  array: np.ndarray, dtype: str, compute_dtype: str, *, what: str, report: CastReport
) -> np.ndarray:
  """A tensor's numbers in another dtype.

  Args:
    array: floating-point.
    dtype: of the stored weights.
    compute_dtype: that the model casts the stored weights to when it uses them.
    what: names the file and the tensor in messages.
    report: counts the numbers that become 0.

  Returns:
    A contiguous array in `dtype`.

  Raises:
    ConversionError: a number is not finite, or too large for one of the dtypes.
  """
  if array.size and not np.isfinite(array).all():
    count = int((~np.isfinite(array)).sum())
    raise ConversionError(f"{what} holds {count} numbers that are not finite.")
  for name in dict.fromkeys((dtype, compute_dtype)):
    _check_range(array, name, what)
  changed = np.ascontiguousarray(array.astype(jnp.dtype(dtype), copy=False))
  report.total += array.size
  if changed.dtype != array.dtype:
    report.zeroed += int(np.count_nonzero(array)) - int(np.count_nonzero(changed))
  return changed


def _check_range(array: np.ndarray, dtype: str, what: str) -> None:
  """Raises ConversionError if the largest magnitude rounds to infinity."""
  if not array.size or array.dtype == jnp.dtype(dtype):
    return
  largest = np.float32(max(array.max(), -array.min()))
  with np.errstate(over="ignore"):
    if np.isfinite(np.asarray(largest).astype(jnp.dtype(dtype))):
      return
  raise ConversionError(
    f"{what} holds numbers up to {float(largest):.6g}, which {dtype} cannot hold (at most "
    f"{float(jnp.finfo(dtype).max):.6g}). Use bfloat16 or float32."
  )
