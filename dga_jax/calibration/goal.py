"""What a calibration is for."""

import dataclasses

from dga_jax.calibration.candidates import Objective


@dataclasses.dataclass(frozen=True)
class Goal:
  """What the allocation is for.

  Attributes:
    share: bound on the cost, as a share of the cost of dense attention, above 0 and at most 1.
    objective: the cost.
    length: L, tokens of the context.
    tail: see `profile.measure_profile`.
    rows: most distinct rows of settings; see `allocation.Bounds`.
    improved: starts that are improved by measured changes, those of the lowest scores.
    rounds: largest number of measured swaps of a start.
    refinements: most passes in which heads are measured again beside the best set.
    table_shares: shares of the table of predicted and measured losses.
  """

  share: float
  objective: Objective
  length: int
  tail: float
  rows: int
  improved: int
  rounds: int
  refinements: int
  table_shares: tuple[float, ...]

  def __post_init__(self) -> None:
    for share in (self.share, *self.table_shares):
      if not 0 < share <= 1:
        raise ValueError(f"a share of the dense cost is {share}; it must be above 0, at most 1.")
    for name in ("rows", "improved"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
