"""Local correction of an allocation: changes that measuring accepts or rejects.

The damage of a set is not the sum of its heads' damages, so the solver's set need not be the best.
The correction starts from the best of several sets. It measures heads again beside the best set and
moves many heads at once, as long as this lowers the score. Then it swaps pairs of heads.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dga_jax.calibration.allocation import allocate, Near

_CONSIDERED = 64  # Heads of each direction that are combined into swaps.


class Corrected(NamedTuple):
  """The result of `correct`.

  Attributes:
    choice: the candidate of each head.
    score: its measured score.
    start: the index of the start with the lowest score.
    starts: the measured score of each start.
    tried: changes of this start that were measured.
    accepted: changes that lowered the score.
  """

  choice: Int[np.ndarray, "H"]
  score: float
  start: int
  starts: tuple[float, ...]
  tried: int
  accepted: int

  def best(self, other: "Corrected", start: int) -> "Corrected":
    """The result with the lower score, with the changes of both and the starts of this one.

    Args:
      other: a correction of one set.
      start: the index of that set, or of the start that it was made from, among these starts.
    """
    better = other._replace(start=start) if other.score < self.score else self
    return better._replace(
      starts=self.starts,
      tried=self.tried + other.tried,
      accepted=self.accepted + other.accepted,
    )


def correct(
  starts: Sequence[Int[np.ndarray, "H"]],
  damage_HxC: Float[np.ndarray, "H C"],
  cost_C: Float[np.ndarray, "C"],
  budget: float,
  *,
  measure: Callable[[Int[np.ndarray, "H"]], float],
  rounds: int,
  measure_beside: Callable[[Int[np.ndarray, "H"]], Float[np.ndarray, "H C"]],
  refinements: int,
) -> Corrected:
  """Measures changes of the best start and keeps each one that lowers the measured score.

  In a refinement the damages are measured again beside the best set. The solver then moves at most
  H, H/2, H/4, ... 2 heads of it, and each of these sets is measured. A refinement that finds no
  better set is the last one.

  A swap gives one head a candidate of less damage and another head one of more, within the budget
  and among the candidates in use. Swaps are measured in the order of the damage that they add by
  prediction; after an accepted swap the order is made anew.

  Args:
    starts: allocations within the budget.
    damage_HxC: predicted damage of each head under each candidate.
    cost_C: of one head under each candidate.
    budget: bound on the sum of costs.
    measure: the score of a set; lower is better.
    rounds: largest number of measured swaps.
    measure_beside: the damages beside a set; infinite for candidates that were not measured.
    refinements: most passes of `measure_beside`.
  """
  search = _Search(measure)
  scores = tuple(search.score(start_H) for start_H in starts)
  best = int(np.argmin(scores))
  choice_H, score = starts[best], scores[best]
  first = len(search.scores)
  accepted = 0
  for _ in range(refinements):
    damage_HxC = measure_beside(choice_H)
    base_H, before, moved = choice_H, score, len(choice_H)
    while moved >= 2:
      moved_H = allocate_finite(damage_HxC, cost_C, budget, Near(base_H, moved))
      if search.is_new(moved_H) and (measured := search.score(moved_H)) < score:
        choice_H, score, accepted = moved_H, measured, accepted + 1
      moved //= 2
    if score == before:
      break
  used = np.unique(choice_H)
  proposals = _swaps(choice_H, damage_HxC, cost_C, budget, used)
  for _ in range(rounds):
    proposal_H = next(filter(search.is_new, proposals), None)
    if proposal_H is None:
      break
    if (measured := search.score(proposal_H)) < score:
      choice_H, score, accepted = proposal_H, measured, accepted + 1
      proposals = _swaps(choice_H, damage_HxC, cost_C, budget, used)
  return Corrected(choice_H, score, best, scores, len(search.scores) - first, accepted)


def allocate_finite(
  damage_HxC: Float[np.ndarray, "H C"],
  cost_C: Float[np.ndarray, "C"],
  budget: float,
  near: Near | None = None,
) -> Int[np.ndarray, "H"]:
  """`allocate` among the candidates whose damages are finite for all heads."""
  finite = np.flatnonzero(np.isfinite(damage_HxC).all(axis=0))
  if near is not None:
    near = Near(np.searchsorted(finite, near.choice), near.heads)
  return finite[allocate(damage_HxC[:, finite], cost_C[finite], budget, near=near)]


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
  choice_H: np.ndarray, damage_HxC: np.ndarray, cost_C: np.ndarray, budget: float, used: np.ndarray
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
    yield proposal_H


def _least(added_HxC: np.ndarray, allowed_HxC: np.ndarray) -> list[tuple[int, int]]:
  """The allowed pairs of a head and a candidate that add least damage."""
  pairs = sorted(zip(*np.nonzero(allowed_HxC), strict=True), key=lambda pair: added_HxC[pair])
  return [(int(head), int(candidate)) for head, candidate in pairs[:_CONSIDERED]]
