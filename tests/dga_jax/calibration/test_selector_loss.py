"""The selector's loss: its least value, features of other sizes, constant features."""

import jax.numpy as jnp
import numpy as np
import scipy.optimize
from scipy.special import log_softmax, softmax

from dga_jax.calibration.selector_loss import minimise_cross_entropy

N, G, S = 2, 300, 8


def blocks_of_tokens():
  """Features of sizes 1 to 1000 with offsets, the last of which is constant, and targets.

  The target is no linear function of the features.
  """
  rng = np.random.default_rng(0)
  x = rng.normal(size=(N, G, S, 4))
  target = 3 * np.tanh(x[..., 0] - 0.5 * x[..., 1]) + x[..., 2] ** 2 + rng.normal(size=x.shape[:3])
  x = np.concatenate([x * [1, 1e-3, 1e3, 10] + [0, 1e-3, 50, -20], np.full((N, G, S, 1), 0.3)], -1)
  return x, target


def loss(weights_S, x_gxsxS, target_gxs):
  shares, logs = softmax(target_gxs, axis=-1), log_softmax(x_gxsxS @ weights_S, axis=-1)
  return -(shares * logs).sum(axis=-1).mean()


def regression(x_gxsxS, target_gxs):
  """The least squared error of centred targets."""
  x, y = (z - z.mean(axis=1, keepdims=True) for z in (x_gxsxS, target_gxs[..., None]))
  return np.linalg.lstsq(x.reshape(-1, x.shape[-1]), y.ravel(), rcond=1e-12)[0]


def test_the_fit_has_nearly_the_least_cross_entropy():
  x, target = blocks_of_tokens()
  start = np.stack([regression(x[n], target[n]) for n in range(N)])
  got = minimise_cross_entropy(*(jnp.asarray(array, jnp.float32) for array in (start, x, target)))
  scale = np.array([1, 1e-3, 1e3, 10, 1])
  for n in range(N):
    best = scipy.optimize.minimize(lambda w, n=n: loss(w / scale, x[n], target[n]), np.zeros(5)).fun
    assert loss(start[n], x[n], target[n]) > best + 0.05
    assert loss(np.asarray(got)[n], x[n], target[n]) < best + 2e-3
  np.testing.assert_array_equal(got[:, -1], 0)
