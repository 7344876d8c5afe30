"""Local correction of an allocation: swaps of heads that measuring accepts or rejects.

The damage of a set is not the sum of its heads' damages, so the solver's set need not be the best.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

_CONSIDERED = 64  # Heads of each direction that are combined into swaps.


class Corrected(NamedTuple):
  """The result of `correct`.

  Attributes:
    choice: the candidate of each head.
    score: its measured score.
    tried: swaps that were measured.
    accepted: swaps that lowered the score.
  """

  choice: Int[np.ndarray, "H"]
  score: float
  tried: int
  accepted: int


def correct(
  choice_H: Int[np.ndarray, "H"],
  damage_HxC: Float[np.ndarray, "H C"],
  cost_C: Float[np.ndarray, "C"],
  budget: float,
  *,
  measure: Callable[[Int[np.ndarray, "H"]], float],
  rounds: int,
) -> Corrected:
  """Measures up to `rounds` swaps and keeps each one that lowers the measured score.

  A swap gives one head a candidate of less damage and another head one of more, within the budget
  and among the candidates in use. Swaps are measured in the order of the damage that they add by
  prediction; after an accepted swap the order is made anew.

  Args:
    choice_H: the allocation to correct.
    damage_HxC: predicted damage of each head under each candidate.
    cost_C: of one head under each candidate.
    budget: bound on the sum of costs.
    measure: the score of a set; lower is better.
    rounds: largest number of measured swaps.
  """
  score, accepted = measure(choice_H), 0
  seen = {choice_H.tobytes()}
  used = np.unique(choice_H)
  proposals = _swaps(choice_H, damage_HxC, cost_C, budget, used)
  tried = 0
  while tried < rounds:
    proposal_H = next((one for one in proposals if one.tobytes() not in seen), None)
    if proposal_H is None:
      break
    seen.add(proposal_H.tobytes())
    tried += 1
    if (measured := measure(proposal_H)) < score:
      choice_H, score, accepted = proposal_H, measured, accepted + 1
      proposals = _swaps(choice_H, damage_HxC, cost_C, budget, used)
  return Corrected(choice_H, score, tried, accepted)


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
