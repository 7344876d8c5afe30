"""The allocation: which candidate each head follows, as a knapsack that a MILP solver solves."""

from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, sparse

from dga_jax.calibration.measuring import HeadRises, SetLoss
from dga_jax.head_budgets import MAX_SETTINGS

_SECONDS = 60.0
_PRIOR = 1e-3
ROUNDING = 1e-12  # Of the sum of costs that are not integers.
# The solver accepts a row that exceeds its bound by 1e-6. A solution that does is solved for again
# under a bound that is lower by this share.
_TIGHTER = 1e-5


class Near(NamedTuple):
  """A bound on the difference of two allocations.

  Attributes:
    choice: the candidate of each head.
    heads: the most heads that may follow another candidate.
  """

  choice: Int[np.ndarray, "H"]
  heads: int


class Scale(NamedTuple):
  """Sums of the rises over all heads, which make text and retrieval comparable.

  The sums are over all heads, each under the candidate that raises the sum most; 1 if no head
  raises the divergence.

  Attributes:
    text: nats per token.
    retrieval: likewise.
  """

  text: float
  retrieval: float

  @classmethod
  def from_rises(cls, rises: HeadRises) -> Self:
    """The sums; a fall of the divergence counts as 0."""
    return cls(*(float(np.maximum(rise, 0).sum(axis=(0, 1)).max()) or 1.0 for rise in rises))

  def damage(self, rises: HeadRises) -> Float[np.ndarray, "K N C"]:
    """The predicted damage of each head and candidate: its share of both sums, added.

    A fall of the divergence counts as 0, so that noise earns nothing.
    """
    return sum(
      (np.maximum(rise, 0) / total for rise, total in zip(rises, self, strict=True)),
      np.zeros(rises.text.shape),
    )

  def score(self, measured: SetLoss) -> float:
    """The measured damage of a set: its divergence from dense attention as shares of the sums."""
    text, retrieval = measured.divergence
    return text / self.text + retrieval / self.retrieval


def with_prior(
  damage_HxC: Float[np.ndarray, "H C"], cost_C: Float[np.ndarray, "C"]
) -> Float[np.ndarray, "H C"]:
  """Damages, each raised by the share of the full cost that the candidate saves, times 1e-3/H.

  Rises below the noise of the measurement are 0 for several candidates. Of these the allocation
  then takes the candidate with more keys, if the budget allows it.

  Args:
    damage_HxC: of each head under each candidate.
    cost_C: of one head under each candidate; "full" is the first.
  """
  return damage_HxC + _PRIOR / len(damage_HxC) * np.maximum(1 - cost_C / cost_C[0], 0)[None]


def allocate(
  damage_HxC: Float[np.ndarray, "H C"],
  cost_C: Float[np.ndarray, "C"],
  budget: float,
  *,
  max_settings: int = MAX_SETTINGS,
  near: Near | None = None,
) -> Int[np.ndarray, "H"]:
  """The candidate of each head that minimises the sum of damages within a budget.

  minimise Σ damage[h, c]·x[h, c] with Σ_c x[h, c] = 1, Σ cost[c]·x[h, c] ≤ budget,
  x[h, c] ≤ y[c] and Σ y ≤ max_settings; x and y are 0 or 1.

  Args:
    damage_HxC: of each of H heads under each of C candidates.
    cost_C: of one head under each candidate, greater than 0.
    budget: bound on the sum of costs.
    max_settings: largest number of distinct candidates.
    near: bounds the heads that differ from another allocation within the budget.

  Raises:
    ValueError: the cheapest candidate in all heads exceeds the budget.
    RuntimeError: the solver found no solution within a minute.
  """
  H, C = damage_HxC.shape
  least, most = H * cost_C.min(), budget * (1 + ROUNDING)
  if least > most:
    raise ValueError(
      f"the budget is {budget:.6g}, and the cheapest candidate in all heads costs {least:.6g}:"
      " raise --keys, or give smaller --windows or larger --blocks."
    )
  for bound in (1.0, 1.0 - _TIGHTER):
    choice_H = _solve(damage_HxC, cost_C / budget, bound, min(max_settings, C), near)
    if choice_H is None:
      break
    if cost_C[choice_H].sum() <= most:
      return choice_H
  return np.full(H, int(cost_C.argmin())) if near is None else near.choice


def _solve(
  damage_HxC: np.ndarray, cost_C: np.ndarray, bound: float, max_settings: int, near: Near | None
) -> Int[np.ndarray, "H"] | None:
  """The best allocation; None if none is within the bound and near the other one."""
  H, C = damage_HxC.shape
  one_each = sparse.hstack([sparse.kron(sparse.eye(H), np.ones((1, C))), sparse.csr_array((H, C))])
  total = np.concatenate([np.tile(cost_C, H), np.zeros(C)])[None]
  used = sparse.hstack([sparse.eye(H * C), sparse.kron(np.ones((H, 1)), -sparse.eye(C))])
  settings = np.concatenate([np.zeros(H * C), np.ones(C)])[None]
  constraints = [
    optimize.LinearConstraint(one_each, 1, 1),
    optimize.LinearConstraint(total, -np.inf, bound),
    optimize.LinearConstraint(used, -np.inf, 0),
    optimize.LinearConstraint(settings, -np.inf, max_settings),
  ]
  if near is not None:
    is_same = np.zeros(H * C + C)
    is_same[np.arange(H) * C + near.choice] = 1
    constraints.append(optimize.LinearConstraint(is_same[None], H - near.heads, np.inf))
  solution = optimize.milp(
    np.concatenate([damage_HxC.ravel(), np.zeros(C)]),
    integrality=np.ones(H * C + C),
    bounds=optimize.Bounds(0, 1),
    constraints=constraints,
    options={"time_limit": _SECONDS, "mip_rel_gap": 1e-6},
  )
  if solution.x is None:
    if near is not None:
      return None
    raise RuntimeError(f"the allocation has no solution: {solution.message}")
  is_chosen_HxC: Bool[np.ndarray, "H C"] = solution.x[: H * C].reshape(H, C) > 0.5
  return is_chosen_HxC.argmax(axis=1)
