"""The compact entries of a block whose scores tie or are NaN."""

import jax.numpy as jnp
import numpy as np
import pytest

from dga_jax import DGAConfig
from dga_jax.cache.summary import block_entries

CONFIG = DGAConfig(selection="streaming", group_size=6, importance_rate=0.25, min_focal_tokens=0)
SIZE, KEPT = CONFIG.block_size, CONFIG.focal_in_block


def summary(key_s):
  """Keys and values [F] of the compact entries of a block with D = 1.

  The value of a token is its offset in the block.
  """
  key, value = (
    jnp.asarray(x, jnp.float32)[None, None, :, None, None] for x in (key_s, np.arange(SIZE))
  )
  return [np.ravel(x) for x in block_entries(jnp.ones((1, 1, 1, 1)), key, value, CONFIG)]


@pytest.mark.parametrize("seed", range(5))
def test_ties_keep_the_earlier_tokens(seed):
  assert KEPT == 2
  key_s = np.random.default_rng(seed).integers(0, 3, SIZE)
  focal = np.sort(np.argsort(-key_s, kind="stable")[:KEPT])
  _, value = summary(key_s)
  np.testing.assert_array_equal(value[:KEPT], focal)
  rest = np.setdiff1d(np.arange(SIZE), focal)
  weights = np.exp(key_s[rest]) / np.exp(key_s[rest]).sum()
  np.testing.assert_allclose(value[KEPT], weights @ rest, rtol=1e-6)


def test_nan_reaches_the_merged_key():
  """The value stays finite for queries that do not see the entry: 0 · NaN is NaN."""
  key_s = np.zeros(SIZE)
  key_s[SIZE - 1] = np.nan
  key, value = summary(key_s)
  np.testing.assert_array_equal(value[:KEPT], np.arange(KEPT))
  assert np.isnan(key[KEPT])
  assert np.isfinite(value[KEPT])
