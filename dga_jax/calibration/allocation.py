"""The allocation: which candidate each head follows, as a knapsack that a MILP solver solves."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, sparse

from dga_jax.calibration.measuring import Divergence, HeadRises
from dga_jax.head_budgets import MAX_SETTINGS

_SECONDS = 60.0
_GAP, _GAP_OF_ROWS = 1e-6, 1e-3  # Relative gaps at which the solver stops.
_MOST_ROW_KINDS = 512
_PRICES = 64
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


class Bounds(NamedTuple):
  """Bounds on the compiled program of a model.

  Attributes:
    kv_heads: N, KV heads of a layer. The heads 0 … N − 1 are those of the first layer.
    rows: most distinct rows, where a row is the settings of a layer's heads in sorted order.
      `apply_budgets` sorts the heads of a layer, and the program has a branch for each row.
    settings: most distinct settings.
  """

  kv_heads: int
  rows: int
  settings: int = MAX_SETTINGS


def sorted_rows(choice_H: Int[np.ndarray, "H"], kv_heads: int) -> Int[np.ndarray, "K N"]:
  """The choices of each layer in sorted order."""
  return np.sort(choice_H.reshape(-1, kv_heads), axis=1)


def count_rows(choice_H: Int[np.ndarray, "H"], kv_heads: int) -> int:
  """Distinct rows of an allocation; see `Bounds.rows`."""
  return len(np.unique(sorted_rows(choice_H, kv_heads), axis=0))


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

  def score(self, rise: Divergence) -> float:
    """The measured damage of a set: its rises over dense attention as shares of the sums."""
    return rise.text / self.text + rise.retrieval / self.retrieval


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
  bounds: Bounds,
  *,
  near: Near | None = None,
) -> Int[np.ndarray, "H"]:
  """The candidate of each head that minimises the sum of damages within a budget.

  minimise Σ damage[h, c]·x[h, c] with Σ_c x[h, c] = 1, Σ cost[c]·x[h, c] ≤ budget,
  x[h, c] ≤ y[c] and Σ y ≤ bounds.settings; x and y are 0 or 1.

  If the solution has more distinct rows than `bounds.rows`, a second problem has its settings
  alone, and chooses one of the possible rows r for each layer k and the order of its settings:
  Σ_(h in k) x[h, c] = Σ_r count[r, c]·z[k, r] with Σ_r z[k, r] = 1, z[k, r] ≤ w[r] and
  Σ w ≤ bounds.rows.

  Args:
    damage_HxC: of each of H heads under each of C candidates.
    cost_C: of one head under each candidate, greater than 0.
    budget: bound on the sum of costs.
    bounds: on settings and rows.
    near: bounds the heads that differ from another allocation within the budget and the bounds.

  Raises:
    ValueError: the cheapest candidate in all heads exceeds the budget.
    RuntimeError: the solver found no solution within its time.
  """
  H = len(damage_HxC)
  least, most = H * cost_C.min(), budget * (1 + ROUNDING)
  if least > most:
    raise ValueError(
      f"the budget is {budget:.6g}, and the cheapest candidate in all heads costs {least:.6g}:"
      " raise --keys, or give smaller --windows or larger --blocks."
    )
  no_row = np.zeros((0, len(cost_C)), int)
  choice_H = _within(damage_HxC, cost_C, budget, bounds, near, no_row)
  if count_rows(choice_H, bounds.kv_heads) <= bounds.rows:
    return choice_H
  used = np.unique(choice_H if near is None else np.concatenate([choice_H, near.choice]))
  if near is not None:
    near = Near(np.searchsorted(used, near.choice), near.heads)
  own_HxC, own_C = damage_HxC[:, used], cost_C[used]
  rows = _possible_rows(own_HxC, own_C, budget, bounds.kv_heads)
  if near is not None:  # Without its own rows the other allocation would be out of reach.
    rows = np.concatenate([rows, _counts(sorted_rows(near.choice, bounds.kv_heads), len(used))])
    rows = np.unique(rows, axis=0)
  return used[_within(own_HxC, own_C, budget, bounds, near, rows)]


def _within(
  damage_HxC: np.ndarray,
  cost_C: np.ndarray,
  budget: float,
  bounds: Bounds,
  near: Near | None,
  count_RxC: Int[np.ndarray, "R C"],
) -> Int[np.ndarray, "H"]:
  """The best allocation within the budget, among rows with these counts; R is 0 for all rows.

  Raises:
    RuntimeError: the solver found no solution within its time.
  """
  for bound in (1.0, 1.0 - _TIGHTER):
    choice_H = _solve(damage_HxC, cost_C / budget, bound, bounds, near, count_RxC)
    if choice_H is None:
      if near is None and bound == 1:
        raise RuntimeError(
          f"the allocation has no solution within {_SECONDS:g} seconds; give fewer --blocks or "
          "--windows, or more --layer_kinds"
        )
      break
    if cost_C[choice_H].sum() <= budget * (1 + ROUNDING):
      return choice_H
  return np.full(len(damage_HxC), int(cost_C.argmin())) if near is None else near.choice


def _possible_rows(
  damage_HxC: np.ndarray, cost_C: np.ndarray, budget: float, kv_heads: int
) -> Int[np.ndarray, "R C"]:
  """How many heads of a layer follow each candidate, in each of the rows to choose from.

  All multisets of N candidates; or, if these are too many, the rows that a layer takes when each
  unit of cost has a price, for a range of prices.
  """
  H, C = damage_HxC.shape
  if math.comb(C + kv_heads - 1, kv_heads) <= _MOST_ROW_KINDS:
    every = itertools.combinations_with_replacement(range(C), kv_heads)
    rows = np.array(list(every))
  else:
    unit = max(float(damage_HxC.max()), 1e-12) * H / budget
    prices = np.concatenate([[0], np.geomspace(1e-6, 1e3, _PRICES - 1)]) * unit
    choices = [(damage_HxC + price * cost_C).argmin(axis=1) for price in prices]
    rows = np.concatenate([sorted_rows(choice_H, kv_heads) for choice_H in choices])
    rows = np.unique(np.concatenate([rows, np.full((1, kv_heads), cost_C.argmin())]), axis=0)
  return _counts(rows, C)


def _counts(rows: Int[np.ndarray, "R N"], candidates: int) -> Int[np.ndarray, "R C"]:
  """How many heads of each row follow each candidate."""
  return np.stack([np.bincount(row, minlength=candidates) for row in rows])


def _solve(
  damage_HxC: np.ndarray,
  cost_C: np.ndarray,
  bound: float,
  bounds: Bounds,
  near: Near | None,
  count_RxC: Int[np.ndarray, "R C"],
) -> Int[np.ndarray, "H"] | None:
  """The best allocation; None if none is within the bounds and near the other one.

  The variables are x [H, C], y [C], z [K, R] and w [R] of `allocate`; without rows, R is 0.
  """
  (H, C), R = damage_HxC.shape, len(count_RxC)
  K = H // bounds.kv_heads if R else 0
  sizes = (H * C, C, K * R, R)

  def constrain(parts: Sequence[Any], low: Any, high: Any) -> optimize.LinearConstraint:
    """Bounds on sums: the coefficients of x, y, z and w; None for 0."""
    height = next(part.shape[0] for part in parts if part is not None)
    blocks = [
      sparse.csr_array((height, size)) if part is None else sparse.csr_array(part)
      for part, size in zip(parts, sizes, strict=True)
    ]
    return optimize.LinearConstraint(sparse.hstack(blocks, format="csr"), low, high)

  one_each = sparse.kron(sparse.eye(H), np.ones((1, C)))
  constraints = [
    constrain((one_each, None, None, None), 1, 1),
    constrain((np.tile(cost_C, H)[None], None, None, None), -np.inf, bound),
    constrain(
      (sparse.eye(H * C), -sparse.kron(np.ones((H, 1)), sparse.eye(C)), None, None), -np.inf, 0
    ),
    constrain((None, np.ones((1, C)), None, None), -np.inf, min(bounds.settings, C)),
  ]
  if near is not None:
    is_same = np.zeros(H * C)
    is_same[np.arange(H) * C + near.choice] = 1
    constraints.append(constrain((is_same[None], None, None, None), H - near.heads, np.inf))
  if R:
    in_layer = sparse.kron(sparse.eye(K), np.ones((1, bounds.kv_heads)))
    follow = sparse.kron(in_layer, sparse.eye(C))
    one_row = sparse.kron(sparse.eye(K), np.ones((1, R)))
    in_use = -sparse.kron(np.ones((K, 1)), sparse.eye(R))
    constraints += [
      constrain((follow, None, -sparse.kron(sparse.eye(K), count_RxC.T), None), 0, 0),
      constrain((None, None, one_row, None), 1, 1),
      constrain((None, None, sparse.eye(K * R), in_use), -np.inf, 0),
      constrain((None, None, None, np.ones((1, R))), -np.inf, bounds.rows),
    ]
  solution = optimize.milp(
    np.concatenate([damage_HxC.ravel(), np.zeros(sum(sizes[1:]))]),
    integrality=np.ones(sum(sizes)),
    bounds=optimize.Bounds(0, 1),
    constraints=constraints,
    options={"time_limit": _SECONDS, "mip_rel_gap": _GAP_OF_ROWS if R else _GAP},
  )
  if solution.x is None:
    return None
  is_chosen_HxC: Bool[np.ndarray, "H C"] = solution.x[: H * C].reshape(H, C) > 0.5
  return is_chosen_HxC.argmax(axis=1)
