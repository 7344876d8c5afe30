"""Allocations from which the correction starts: the solver's, and simple ones of equal cost."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dga_jax.calibration.allocation import allocate, Bounds, count_rows
from dga_jax.calibration.comparison import (
  Baseline,
  most_sinks,
  one_setting,
  scale_windows,
  spread_window,
)
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import HeadSetting, read_calibrated, SinkWindow
from dga_jax.model import ModelConfig


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
  bounds: Bounds,
  *,
  length: int,
  equal_bytes: bool,
) -> list[Start]:
  """The solver's allocations, DuoAttention's forms, and one setting in all heads.

  The solver allocates all candidates; all but the blocks of one size, for each size that this
  allocation has; and windows alone. A set that is worse by prediction may be better by measurement.

  DuoAttention's form has full heads, and sinks and a window in the others (Xiao et al., arXiv
  2410.10819). There is one such start for each window among the candidates, whose full heads the
  solver chooses, and with `equal_bytes` one with the full heads of the solver's first allocation.

  Args:
    candidates: of the calibration; "full" is the first.
    damage_HxC: predicted damage of each head under each candidate.
    cost_C: of one head under each candidate.
    budget: bound on the sum of costs.
    shape: layers and KV heads; their product is H.
    bounds: on settings and rows. One setting in all heads, and forms with one window, that exceed
      the bound on rows are left out.
    length: L, tokens of the context.
    equal_bytes: whether the budget is of bytes. Windows are then enlarged to the bytes that are
      left.

  Raises:
    ValueError: the cheapest candidate in all heads exceeds the budget.
  """
  settings = tuple(candidates)

  def solve(of: Sequence[int]) -> Int[np.ndarray, "K N"]:
    """The allocation of the candidates with these indices."""
    choice_H = allocate(damage_HxC[:, of], cost_C[of], budget, bounds)
    return np.asarray(of)[choice_H].reshape(shape)

  def reaches(of: Sequence[int]) -> bool:
    return len(damage_HxC) * cost_C[of].min() <= budget

  solved_KxN = solve(range(len(candidates)))
  starts = [Start("solver, all candidates", Baseline(settings, solved_KxN))]
  starts += [
    Start(f"solver, {name}", Baseline(settings, solve(of)))
    for name, of in _parts(candidates, set(solved_KxN.ravel().tolist()))
    if reaches(of)
  ]
  forms = [solved_KxN] if equal_bytes else []
  forms += [
    solve([0, index])
    for index, one in enumerate(candidates)
    if isinstance(one, SinkWindow) and reaches([index])
  ]
  keys = int(budget / cost_C[0] * length)
  for form_KxN in forms:
    form: Baseline | None = Baseline(settings, form_KxN)
    if equal_bytes:
      form = spread_window(form_KxN == 0, keys, most_sinks(candidates), length)
    if form is not None and count_rows(form.assignment.ravel(), shape[1]) <= bounds.rows:
      starts.append(Start(f"{(form_KxN == 0).sum()} full heads, sinks and window", form))
  if equal_bytes and (uniform := one_setting(settings, solved_KxN, length)) is not None:
    starts.append(Start("one DGA setting", uniform))
  return starts


def read_starts(paths: Iterable[Path], config: ModelConfig, length: int) -> list[Start]:
  """Sets from files of budgets, each named after its file.

  Args:
    paths: files of `dga calibrate`, or of `HeadBudgets.to_json`, which name no length.
    config: of the model.
    length: L. Windows are scaled to it from the length that a file names.

  Raises:
    OSError: a file cannot be read.
    ValueError: a file has no budgets, or those of another model.
  """
  starts = []
  shape = (config.num_layers, config.num_kv_heads)
  for path in paths:
    budgets, stored = read_calibrated(path)
    if (budgets.num_layers, budgets.num_kv_heads) != shape:
      raise ValueError(
        f"{path} has budgets of {budgets.num_layers} layers of {budgets.num_kv_heads} KV heads, and"
        f" the model has {shape[0]} of {shape[1]}: give files of the same model."
      )
    fitted = [x for x in budgets.settings if isinstance(x, DGAConfig) and x.selector == "fitted"]
    if fitted and not config.focal_selector:
      raise ValueError(
        f"{path} has settings with selector='fitted', and the model has no fitted selector: give"
        " the model that `dga fit_selector` wrote as --workdir."
      )
    one = Baseline(budgets.settings, np.array(budgets.assignment))
    starts.append(Start(path.name, scale_windows(one, length / stored.get("length", length))))
  return starts


def bound_rows(
  start: Start, damage_HxC: Float[np.ndarray, "H C"], cost_C: Float[np.ndarray, "C"], bounds: Bounds
) -> Start:
  """The start with few distinct rows: as few heads as possible follow another of its settings.

  Args:
    start: a set of any number of rows.
    damage_HxC: predicted damage of each head under each candidate of the set; decides among sets
      of equally many changed heads.
    cost_C: of one head under each candidate of the set. The cost of the set does not rise.
    bounds: on settings and rows.
  """
  candidates, choice_H = start.set.candidates, start.set.assignment.ravel()
  if count_rows(choice_H, bounds.kv_heads) <= bounds.rows:
    return start
  is_changed_HxC = np.arange(len(candidates)) != choice_H[:, None]
  tie_HxC = damage_HxC / max(float(damage_HxC.max(axis=1).sum()), 1e-12)
  cost = float(cost_C[choice_H].sum())
  few_H = allocate(is_changed_HxC + tie_HxC, cost_C, cost, bounds)
  return start._replace(set=Baseline(candidates, few_H.reshape(start.set.assignment.shape)))


def _parts(candidates: Sequence[HeadSetting], used: set[int]) -> list[tuple[str, list[int]]]:
  """Names and indices of parts of the candidates; see `make_starts`.

  Args:
    candidates: of the calibration.
    used: indices that the allocation of all candidates has.
  """
  blocks = [
    (one.group_size, one.focal_in_block) if isinstance(one, DGAConfig) else None
    for one in candidates
  ]
  sizes = sorted({size for index in used if (size := blocks[index]) is not None})
  parts = [
    (f"without {size[0]}+{size[1]}", [i for i, other in enumerate(blocks) if other != size])
    for size in sizes
    if any(other not in (None, size) for other in blocks)
  ]
  if any(blocks):
    parts.append(("windows alone", [index for index, size in enumerate(blocks) if size is None]))
  return parts
