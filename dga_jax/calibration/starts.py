"""Allocations from which the correction starts: the solver's, and simple ones of equal cost."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dga_jax.calibration.allocation import allocate
from dga_jax.calibration.comparison import Baseline, most_sinks, one_setting, spread_window
from dga_jax.head_budgets import HeadSetting, SinkWindow

SOLVER = "solver"


class Start(NamedTuple):
  """An allocation.

  Attributes:
    name: for messages and the result's file.
    set: its settings, and the setting of each KV head.
  """

  name: str
  set: Baseline


def make_starts(
  candidates: Sequence[HeadSetting],
  damage_HxC: Float[np.ndarray, "H C"],
  cost_C: Float[np.ndarray, "C"],
  budget: float,
  shape: tuple[int, int],
  *,
  length: int,
  equal_bytes: bool,
) -> list[Start]:
  """The solver's allocation, DuoAttention's forms, and one setting in all heads.

  DuoAttention's form has full heads, and sinks and a window in the others (Xiao et al., arXiv
  2410.10819). There is one such start for each window among the candidates, whose full heads the
  solver chooses, and with `equal_bytes` one with the full heads of the solver's first allocation.

  Args:
    candidates: of the calibration; "full" is the first.
    damage_HxC: predicted damage of each head under each candidate.
    cost_C: of one head under each candidate.
    budget: bound on the sum of costs.
    shape: layers and KV heads; their product is H.
    length: L, tokens of the context.
    equal_bytes: whether the budget is of bytes. Windows are then enlarged to the bytes that are
      left.

  Raises:
    ValueError: the cheapest candidate in all heads exceeds the budget.
  """
  settings = tuple(candidates)
  solved_KxN = allocate(damage_HxC, cost_C, budget).reshape(shape)
  starts = [Start(SOLVER, Baseline(settings, solved_KxN))]
  forms = [solved_KxN] if equal_bytes else []
  for index, one in enumerate(candidates):
    if isinstance(one, SinkWindow) and len(damage_HxC) * cost_C[index] <= budget:
      pair = [0, index]
      choice_H = allocate(damage_HxC[:, pair], cost_C[pair], budget)
      forms.append(np.array(pair)[choice_H].reshape(shape))
  keys = int(budget / cost_C[0] * length)
  for form_KxN in forms:
    form: Baseline | None = Baseline(settings, form_KxN)
    if equal_bytes:
      form = spread_window(form_KxN == 0, keys, most_sinks(candidates), length)
    if form is not None:
      starts.append(Start(f"{(form_KxN == 0).sum()} full heads, sinks and window", form))
  if equal_bytes and (uniform := one_setting(settings, solved_KxN, length)) is not None:
    starts.append(Start("one DGA setting", uniform))
  return starts
