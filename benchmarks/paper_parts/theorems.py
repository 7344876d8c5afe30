"""Theorems 1 to 3 of the paper as simulations: each bound beside a measurement.

Theorem 1. Logits ξ of L keys are independent normal variables of deviation σ, and the weights are
their softmax. Published summaries of the paper print the bound

    P_sparse(L, ρ) ≥ max_x 1 − [P(exp ξ ≤ x) · P((Lρ − 1) x ≤ Σ' exp ξ)]^L,

where Σ' omits one key. As x → 0 the first factor is 0, so the maximum is 1 for every L and ρ. A
bound that holds follows from the same two events: if no weight exceeds 1/(Lρ), then S = Σ exp ξ is
at least Lρx or every exp ξ is at most x, so

    P_sparse(L, ρ) ≥ max_x 1 − P(exp ξ ≤ x)^L − P(S ≥ Lρx).

Theorem 2. The m tokens of a group share one weight β, each token receives β/m. Noise of variance σ²
on β gives each token's weight a variance of σ²/m². The mean of independent noise of each token has
the variance σ²/m.

Theorem 3. The loss ‖aᵀV − y‖² of token weights a has the Hessian H = 2 V Vᵀ; group weights b with
a = M b have H̄ = 2 Mᵀ V Vᵀ M. The theorem is κ(H̄) ≤ κ(H).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jax.scipy.special import ndtr
from jaxtyping import Float

from benchmarks.paper_parts.inputs import Inputs
from dga_jax.evaluation.jobs import Job

TASK = "theorems"
LENGTHS = (100, 200, 500, 1000, 3000, 10000)
SIGMAS = (1.0, 2.0, 3.0)
RHO = 0.01
GROUP_SIZES = (1, 2, 4, 8, 16, 32, 64)
HEAD_DIM = 64
RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # L/D.
_SEED = 0


def make_jobs(inputs: Inputs, draws: int = 1000) -> Iterator[Job]:
  """One job for each theorem.

  Args:
    inputs: not used.
    draws: random draws of Theorem 1; the other theorems take a fraction or a multiple of it.
  """
  del inputs
  runs = {1: sparsity_bound, 2: noise_variance, 3: condition_numbers}
  for theorem, run in runs.items():
    yield Job(
      fields={"task": TASK, "theorem": theorem},
      depends_on={
        "seed": _SEED, "draws": draws, "lengths": LENGTHS, "sigmas": SIGMAS, "rho": RHO,
        "group_sizes": GROUP_SIZES, "head_dim": HEAD_DIM, "ratios": RATIOS,
      },
      ticks=1,
      run=functools.partial(_run, run, draws),
      origin="random values",
    )  # fmt: skip


def _run(
  measure: Callable[[int, np.random.Generator], list], draws: int, tick: Callable[[], Any]
) -> dict[str, Any]:
  values = measure(draws, np.random.default_rng(_SEED))
  tick()
  return {"values": values}


def sparsity_bound(draws: int, rng: np.random.Generator) -> list[dict[str, float]]:
  """P_sparse(L, RHO) of independent normal logits, the printed bound, and one that holds."""
  values = []
  for sigma in SIGMAS:
    for length in LENGTHS:
      weight_SxL = np.exp(sigma * rng.standard_normal((draws, length), np.float32))
      sum_S = weight_SxL.sum(axis=1, dtype=np.float64)
      largest_S = weight_SxL.max(axis=1)
      threshold = length * RHO
      log_x = np.linspace(-6 * sigma, 6 * sigma, 600)
      x, cdf = np.exp(log_x), np.asarray(ndtr(log_x / sigma), np.float64)
      rest_S = sum_S - weight_SxL[:, 0]
      tail = np.array([(rest_S >= (threshold - 1) * one).mean() for one in x])
      printed = 1 - (cdf * tail) ** length
      # An event that no draw shows has a probability below 3/draws with 95 % confidence.
      above = np.array([(sum_S >= threshold * one).mean() for one in x]) + 3 / draws
      values.append(
        {
          "sigma": sigma, "length": length,
          "measured": float((largest_S * threshold > sum_S).mean()),
          "printed": float(printed.max()),
          "bound": float(np.clip(1 - cdf**length - above, 0, None).max()),
        }
      )  # fmt: skip
  return values


def noise_variance(draws: int, rng: np.random.Generator) -> list[dict[str, float]]:
  """Variance of a token's weight under noise of variance 1, for each group size."""
  values = []
  for m in GROUP_SIZES:
    shared = rng.standard_normal(100 * draws) / m
    independent = rng.standard_normal((100 * draws, m), np.float32).mean(axis=1)
    values.append({"m": m, "per_group": float(shared.var()), "per_token": float(independent.var())})
  return values


def condition_numbers(draws: int, rng: np.random.Generator) -> list[dict[str, Any]]:
  """κ(H̄)/κ(H) over non-zero eigenvalues, for Gaussian values V and even or uneven weights."""
  values = []
  for m in (4, 16):
    for ratio in RATIOS:
      length = round(ratio * HEAD_DIM)
      for weights in ("even", "uneven"):
        changes = []
        for _ in range(max(draws // 20, 4)):
          V = rng.standard_normal((length, HEAD_DIM))
          logits = np.zeros(length) if weights == "even" else rng.standard_normal(length)
          grouped = merge(V, logits, m)
          changes.append(condition_number(grouped) / condition_number(V))
        change = np.array(changes)
        values.append(
          {
            "m": m, "ratio": ratio, "weights": weights, "median": float(np.median(change)),
            "larger": float((change > 1 + 1e-9).mean()),
          }
        )  # fmt: skip
  return values


def merge(
  V_LxD: Float[np.ndarray, "L D"], logits_L: Float[np.ndarray, "L"], m: int
) -> Float[np.ndarray, "k D"]:
  """Mᵀ V: means of m consecutive rows, weighted by the softmax of their logits."""
  weight_kxm = np.exp(logits_L.reshape(-1, m))
  weight_kxm /= weight_kxm.sum(axis=1, keepdims=True)
  return np.einsum("km,kmd->kd", weight_kxm, V_LxD.reshape(-1, m, V_LxD.shape[1]))


def condition_number(V: Float[np.ndarray, "L D"]) -> float:
  """κ of V Vᵀ over its min(L, D) eigenvalues that are not zero by its rank."""
  singular = np.linalg.svd(V, compute_uv=False)
  return float((singular[0] / singular[-1]) ** 2)
