"""How far a float result may be from the exact one: a bound from the dtype and the sums' lengths.

Let E(x) = ‖x − exact‖ / ‖exact‖ be the error of an array against a reference in float64. A result
is right if

    E(actual) ≤ max(factor · E(plain), floor),

where `plain` is the same computation in jax.numpy in the same dtype, and factor is 2 for values
and 3 for gradients, which pass through twice as many operations.

The floor. Two correct programs add in different orders, and E(plain) may be far below the usual
error of a correct program by luck. So the usual error is allowed as well. Each operation rounds
with a relative error of at most u = eps / 2. The partial sums of n terms of random sign and
variance σ² have size √i·σ, so the errors of the n additions add in quadrature to
u·σ·√(Σ i) = u·σ·n / √2, which is u·√(n / 2) relative to the sum's own size √n·σ. k sums, each of
which reads the results of the one before, add in quadrature to u·√(k·n / 2). Errors that are not
independent (an exponential turns the absolute error of its argument into a relative one) are
allowed for by a factor of 2:

    floor = eps · √(k·n / 2)

Nothing in it depends on a machine: not its instructions, not its threads, not its order of sums.
"""

from typing import Any

import numpy as np

Array = Any  # anything that numpy reads


def relative_error(actual: Array, exact: Array) -> float:
  """‖actual − exact‖ / ‖exact‖ in float64; of an exact zero, infinite unless actual is zero too."""
  actual, exact = (np.asarray(x).astype(np.float64) for x in (actual, exact))
  assert actual.shape == exact.shape, (actual.shape, exact.shape)
  difference, norm = np.linalg.norm(actual - exact), np.linalg.norm(exact)
  if norm == 0:
    return 0.0 if difference == 0 else float("inf")
  return float(difference / norm)


def rounding_floor(terms: int, *, sums: int = 2) -> float:
  """The usual error of a correct program whose sums are float32; see the module.

  Args:
    terms: n, of the longest sum.
    sums: k, how many sums follow one another. Attention has 2: logits, and weighted values.
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
  """Holds a float32 or narrower result to the rule of the module.

  Args:
    actual: the result.
    exact: the reference, in float64.
    terms: of the longest sum.
    sums: how many sums follow one another.
    plain: the same in jax.numpy in the dtype of `actual`; None holds it to the floor alone.
    factor: of the error of `plain`.
    name: for the message.
  """
  error = relative_error(actual, exact)
  allowed = rounding_floor(terms, sums=sums)
  if plain is not None:
    allowed = max(allowed, factor * relative_error(plain, exact))
  assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def assert_same(actual: Array, other: Array, *, terms: int, sums: int = 2, name: str = "") -> None:
  """Two float32 programs for the same numbers: each within the floor of the exact ones."""
  error, allowed = relative_error(actual, other), 2 * rounding_floor(terms, sums=sums)
  assert error <= allowed, f"{name}: difference {error:.2e}, allowed {allowed:.2e}"
