"""The first tokens of rows have the values and the gradients of a slice."""

import jax
import numpy as np
import pytest

from dga_jax.attention.first_tokens import take_first_tokens

X = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)


@pytest.mark.parametrize("count", [0, 2, 7])
def test_the_gradient_is_that_of_a_slice(count: int):
  def taken(x: jax.Array) -> jax.Array:
    x, part = take_first_tokens(x, count)
    return (x**2).sum() + (part**3).sum()

  def sliced(x: jax.Array) -> jax.Array:
    return (x**2).sum() + (x[:, :count] ** 3).sum()

  np.testing.assert_allclose(taken(X), sliced(X), rtol=1e-6)
  np.testing.assert_allclose(jax.grad(taken)(X), jax.grad(sliced)(X), rtol=1e-6)
