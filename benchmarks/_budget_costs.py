"""The costs of sets of head budgets that `dga calibrate --objective` bounds."""

from collections.abc import Sequence
from typing import get_args

import numpy as np

from benchmarks._budget_baselines import as_baseline, Set
from dga_jax.calibration.candidates import head_costs, Objective
from dga_jax.evaluation.report import markdown
from dga_jax.model import ModelConfig


def costs_table(sets: Sequence[Set], config: ModelConfig, length: int) -> str:
  """Bytes, operations of attention and its time in one prefill, summed over all heads.

  The time of a head is measured with all heads of a layer under its setting; see `head_costs`.

  Args:
    sets: dense attention is the first.
    config: of the model.
    length: L, tokens of the one sequence.
  """
  settings = list(dict.fromkeys(setting for one in sets for setting in one.budgets.settings))
  own = [as_baseline(one.budgets).indices(settings) for one in sets]
  cells = [[one.file, one.kind] for one in sets]
  for objective in get_args(Objective):
    costs = head_costs(objective, settings, config, length)
    total = np.array([costs[indices].sum() for indices in own])
    for row, cost, share in zip(cells, total, total / total[0], strict=True):
      unit = {"bytes": f"{cost / 1e6:.1f} MB", "flops": f"{cost / 1e9:.2f} GFLOP"}
      row += [unit.get(objective, f"{cost * 1e3:.2f} ms"), f"{share:.4f}"]
  header = ["bytes", "share", "operations", "share", "time of attention", "share"]
  return markdown(["file", "set", *header], cells)
