"""Parts of arrays have the values and the gradients of slices."""

import jax
import jax.numpy as jnp
import numpy as np

from dga_jax.attention.array_parts import put_part, take_part

X = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)


def test_a_taken_part_has_the_gradient_of_a_slice():
  def taken(x):
    x, part = take_part(x, (0, 1, 2), (2, 3, 2))
    return (x**2).sum() + (part**3).sum()

  def sliced(x):
    return (x**2).sum() + (x[:, 1:4, 2:4] ** 3).sum()

  np.testing.assert_allclose(taken(X), sliced(X), rtol=1e-6)
  np.testing.assert_allclose(jax.grad(taken)(X), jax.grad(sliced)(X), rtol=1e-6)


def test_a_written_part_has_the_gradient_of_an_update():
  part = np.random.default_rng(1).normal(size=(2, 5, 1, 3)).astype(np.float32)
  constant = jnp.zeros((2, 5, 4, 3)).at[:, :, 1:].set(1.0)

  def output(write):
    def run(x, part):
      return (write(x * constant, part) ** 3).sum()  # Heads 1 to 3 depend on x.

    return jax.value_and_grad(run, argnums=(0, 1))(X, part)

  for got, wanted in zip(
    jax.tree.leaves(output(lambda x, part: put_part(x, part, (0, 0, 0)))),
    jax.tree.leaves(output(lambda x, part: x.at[:, :, :1].set(part))),
    strict=True,
  ):
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
