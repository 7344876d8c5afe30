"""Error bounds of floating-point results, from the dtype and the lengths of the sums.

Let E(x) = ‖x − exact‖ / ‖exact‖ be the error of an array x relative to a float64 reference. A
result is accepted if

    E(actual) ≤ max(factor · E(plain), floor),

where `plain` is the same computation in jax.numpy in the same dtype. The factor is 2 for values and
3 for gradients, which depend on twice as many operations.

The floor is the typical error of a correct program. It is needed because correct programs add in
different orders, and E(plain) may by chance be far below the typical error. Each operation rounds
with a relative error of at most u = eps / 2. The i-th partial sum of n terms of random sign and
variance σ² has size √i·σ. The errors of the n additions therefore add in quadrature to
u·σ·√(Σ i) = u·σ·n / √2, which is u·√(n / 2) relative to the size √n·σ of the sum. The errors of k
sums, each of which depends on the previous one, add in quadrature to u·√(k·n / 2). A factor of 2
allows for dependent errors: an exponential turns the absolute error of its argument into a relative
error.

    floor = eps · √(k·n / 2)

The floor does not depend on the machine: its instructions, threads or order of sums.
"""

from typing import Any

import numpy as np

Array = Any  # Anything that np.asarray accepts.


def relative_error(actual: Array, exact: Array) -> float:
  """‖actual − exact‖ / ‖exact‖ in float64. If `exact` is zero: 0 for equality, else infinity."""
  actual, exact = (np.asarray(x).astype(np.float64) for x in (actual, exact))
  assert actual.shape == exact.shape, (actual.shape, exact.shape)
  difference, norm = np.linalg.norm(actual - exact), np.linalg.norm(exact)
  if norm == 0:
    return 0.0 if difference == 0 else float("inf")
  return float(difference / norm)


def rounding_floor(terms: int, *, sums: int = 2) -> float:
  """The typical error of a correct program with float32 sums; see the docstring of the module.

  Args:
    terms: n, the number of terms of the longest sum.
    sums: k, the number of sums that depend on one another. Attention has two: logits and output.
  """
  return float(np.finfo(np.float32).eps * np.sqrt(sums * terms / 2))


def assert_close(
  actual: Array,
  exact: Array,
  *,
  terms: int,
  sums: int = 2,
  plain: Array | None = None,
  factor: float = 2,
  name: str = "",
) -> None:
  """Asserts that a result in float32 or a narrower dtype obeys the bound of the module.

  Args:
    actual: the result.
    exact: the reference in float64.
    terms: number of terms of the longest sum.
    sums: number of sums that depend on one another.
    plain: the same computation in jax.numpy in the dtype of `actual`. None allows only the floor.
    factor: multiple of the error of `plain` that is allowed.
    name: name of the result, for the message.
  """
  error = relative_error(actual, exact)
  allowed = rounding_floor(terms, sums=sums)
  if plain is not None:
    allowed = max(allowed, factor * relative_error(plain, exact))
  assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def assert_same(actual: Array, other: Array, *, terms: int, sums: int = 2, name: str = "") -> None:
  """Asserts that two float32 results of one computation differ by at most twice the floor."""
  error, allowed = relative_error(actual, other), 2 * rounding_floor(terms, sums=sums)
  assert error <= allowed, f"{name}: difference {error:.2e}, allowed {allowed:.2e}"
