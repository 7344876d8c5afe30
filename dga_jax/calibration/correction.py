"""Local correction of an allocation: changes that measuring accepts or rejects.

The damage of a set is not the sum of its heads' damages, so the solver's set need not be the best.
The correction measures heads again beside the best set and moves many heads at once, as long as
this lowers the score. Then it swaps pairs of heads.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dga_jax.calibration.allocation import allocate, Bounds, count_rows, Near

_CONSIDERED = 64  # Heads of each direction that are combined into swaps.


class Corrected(NamedTuple):
  """The result of `correct`.

  Attributes:
    choice: the candidate of each head.
    score: its measured score.
    tried: changes that were measured.
    accepted: changes that lowered the score.
  """

  choice: Int[np.ndarray, "H"]
  score: float
  tried: int
  accepted: int


def correct(
  start_H: Int[np.ndarray, "H"],
  score: float,
  damage_HxC: Float[np.ndarray, "H C"],
  cost_C: Float[np.ndarray, "C"],
  budget: float,
  bounds: Bounds,
  *,
  measure: Callable[[Int[np.ndarray, "H"]], float],
  rounds: int,
  measure_beside: Callable[[Int[np.ndarray, "H"]], Float[np.ndarray, "H C"]],
  refinements: int,
) -> Corrected:
  """Measures changes of a set and keeps each one that lowers the measured score.

  In a refinement the damages are measured again beside the best set. The solver then moves at most
  H, H/2, H/4, ... 2 heads of it, and each of these sets is measured. A refinement that finds no
  better set is the last one.

  A swap gives one head a candidate of less damage and another head one of more, within the budget
  and the bounds and among the candidates in use. Swaps are measured in the order of the damage that
  they add by prediction; after an accepted swap the order is made anew.

  Args:
    start_H: an allocation within the budget and the bounds.
    score: its measured score; lower is better.
    damage_HxC: predicted damage of each head under each candidate.
    cost_C: of one head under each candidate.
    budget: bound on the sum of costs.
    bounds: on settings and rows.
    measure: the score of a set.
    rounds: largest number of measured swaps.
    measure_beside: the damages beside a set; infinite for candidates that were not measured.
    refinements: most passes of `measure_beside`.
  """
  search = _Search(measure)
  choice_H = start_H
  search.scores[choice_H.tobytes()] = score
  accepted = 0
  for _ in range(refinements):
    damage_HxC = measure_beside(choice_H)
    base_H, before, moved = choice_H, score, len(choice_H)
    while moved >= 2:
      moved_H = allocate_finite(damage_HxC, cost_C, budget, bounds, Near(base_H, moved))
      if search.is_new(moved_H) and (measured := search.score(moved_H)) < score:
        choice_H, score, accepted = moved_H, measured, accepted + 1
      moved //= 2
    if score == before:
      break
  used = np.unique(choice_H)
  proposals = _swaps(choice_H, damage_HxC, cost_C, budget, bounds, used)
  for _ in range(rounds):
    proposal_H = next(filter(search.is_new, proposals), None)
    if proposal_H is None:
      break
    if (measured := search.score(proposal_H)) < score:
      choice_H, score, accepted = proposal_H, measured, accepted + 1
      proposals = _swaps(choice_H, damage_HxC, cost_C, budget, bounds, used)
  return Corrected(choice_H, score, len(search.scores) - 1, accepted)


def allocate_finite(
  damage_HxC: Float[np.ndarray, "H C"],
  cost_C: Float[np.ndarray, "C"],
  budget: float,
  bounds: Bounds,
  near: Near | None = None,
) -> Int[np.ndarray, "H"]:
  """`allocate` among the candidates whose damages are finite for all heads."""
  finite = np.flatnonzero(np.isfinite(damage_HxC).all(axis=0))
  if near is not None:
    near = Near(np.searchsorted(finite, near.choice), near.heads)
  return finite[allocate(damage_HxC[:, finite], cost_C[finite], budget, bounds, near=near)]


class _Search:
  """Measured scores of sets; a set is measured once."""

  def __init__(self, measure: Callable[[Int[np.ndarray, "H"]], float]) -> None:
    self._measure = measure
    self.scores: dict[bytes, float] = {}

  def is_new(self, choice_H: Int[np.ndarray, "H"]) -> bool:
    return choice_H.tobytes() not in self.scores

  def score(self, choice_H: Int[np.ndarray, "H"]) -> float:
    if self.is_new(choice_H):
      self.scores[choice_H.tobytes()] = self._measure(choice_H)
    return self.scores[choice_H.tobytes()]


def _swaps(
  choice_H: np.ndarray,
  damage_HxC: np.ndarray,
  cost_C: np.ndarray,
  budget: float,
  bounds: Bounds,
  used: np.ndarray,
) -> Iterator[Int[np.ndarray, "H"]]:
  """Neighbours of a choice, the one with the least predicted damage first."""
  heads = np.arange(len(choice_H))
  added_HxC = damage_HxC - damage_HxC[heads, choice_H][:, None]
  cheaper_HxC = cost_C[None] < cost_C[choice_H][:, None]
  dearer_HxC = cost_C[None] > cost_C[choice_H][:, None]
  in_use = np.isin(np.arange(len(cost_C)), used)[None]
  up, down = (_least(added_HxC, mask & in_use) for mask in (dearer_HxC, cheaper_HxC))
  free = budget - cost_C[choice_H].sum()
  moves = []
  for (raised, a), (lowered, b) in itertools.product(up, down):
    cost = cost_C[a] - cost_C[choice_H[raised]] + cost_C[b] - cost_C[choice_H[lowered]]
    if raised != lowered and cost <= free:
      moves.append((added_HxC[raised, a] + added_HxC[lowered, b], raised, a, lowered, b))
  for _, raised, a, lowered, b in sorted(moves):
    proposal_H = choice_H.copy()
    proposal_H[raised], proposal_H[lowered] = a, b
    if count_rows(proposal_H, bounds.kv_heads) <= bounds.rows:
      yield proposal_H


def _least(added_HxC: np.ndarray, allowed_HxC: np.ndarray) -> list[tuple[int, int]]:
  """The allowed pairs of a head and a candidate that add least damage."""
  pairs = sorted(zip(*np.nonzero(allowed_HxC), strict=True), key=lambda pair: added_HxC[pair])
  return [(int(head), int(candidate)) for head, candidate in pairs[:_CONSIDERED]]
