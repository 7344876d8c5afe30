"""The errata of docs/paper.md, each demonstrated numerically."""

import jax
import jax.numpy as jnp
import numpy as np

from dga_jax import DGAConfig
from dga_jax.attention.reference import write_masks


def test_a_group_visible_by_any_member_leaks_the_future():
  """Algorithm 2, step 3 shows a group if any member is visible. Causality requires all members."""
  mask = jnp.asarray(np.isin(np.arange(1, 10), (4, 7, 9)))
  masks = write_masks(mask, jnp.zeros(9, jnp.int32), DGAConfig(group_size=3, min_focal_tokens=0))
  causal = np.tri(9, dtype=bool)
  any_member = (causal[:, None] & np.asarray(masks.member)[None]).any(axis=-1)
  ours = np.asarray(masks.sees_group)
  future = ~causal
  leaks = (any_member[:, :, None] & np.asarray(masks.member)[None] & future[:, None]).any()
  assert leaks
  assert not (ours[:, :, None] & np.asarray(masks.member)[None] & future[:, None]).any()


def test_masking_after_the_softmax_loses_weight():
  """Equation 13 masks after the softmax without renormalising, so rows sum to less than 1."""
  logits = jax.random.normal(jax.random.key(0), (8, 8))
  causal = jnp.tri(8, dtype=bool)
  after = jax.nn.softmax(logits) * causal
  before = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf))
  assert float(after.sum(axis=-1)[0]) < 0.9
  np.testing.assert_allclose(before.sum(axis=-1), 1, rtol=1e-6)


def test_merging_mostly_worsens_the_condition_number_of_gaussian_values():
  """Theorem 3 claims κ(H̄) ≤ κ(H). Most draws of a random Gaussian V contradict it.

  The loss ‖aᵀV − y‖² of token weights a has the Hessian H = 2 V Vᵀ. Group weights b with a = M b
  have the Hessian H̄ = 2 Mᵀ V Vᵀ M. The proof uses σ_min(MᵀHM) ≥ σ_min(MᵀM) σ_min(H). This bound
  holds for the smallest eigenvalue of H, which is 0 for L > D. The proof substitutes the smallest
  non-zero eigenvalue, for which the bound does not hold.
  """
  rng = np.random.default_rng(0)
  L, D, m = 64, 12, 4
  M = np.kron(np.eye(L // m), np.ones((m, 1)) / m)

  def condition(hessian):
    eigenvalues = np.linalg.eigvalsh(hessian)
    eigenvalues = eigenvalues[eigenvalues > 1e-9 * eigenvalues[-1]]
    return eigenvalues[-1] / eigenvalues[0]

  worse = 0
  for _ in range(100):
    V = rng.standard_normal((L, D))
    worse += condition(M.T @ V @ V.T @ M) > condition(V @ V.T)
  assert worse > 90


def test_noise_variance_of_a_group_falls_as_1_over_m():
  """Theorem 2's 1/m² assumes one noise term per group; independent noise per token gives 1/m."""
  rng = np.random.default_rng(0)
  variance = {m: rng.standard_normal((20000, m)).mean(axis=1).var() for m in (1, 4, 16)}
  np.testing.assert_allclose(variance[4] / variance[1], 1 / 4, rtol=0.05)
  np.testing.assert_allclose(variance[16] / variance[1], 1 / 16, rtol=0.05)


def test_table_7_without_complementary_tokens_repeats_the_vanilla_model():
  """Four of six entries of Table 7's row equal the row of the vanilla model in Table 1."""
  vanilla = [6.43, 2.37, 13.65, 56.65, 3.04, 48.00]
  without_complementary = [6.43, 2.37, 8.47, 53.69, 3.04, 48.00]
  assert sum(a == b for a, b in zip(vanilla, without_complementary, strict=True)) == 4
