"""Gradient descent on the paper's problem (Figures 3a and 4, Theorem 3), dense against grouped.

The paper models attention as min over a of ‖Σ_j a_j V_j − y‖² with weights a on the simplex, and
group coding as the same problem over one weight b_g for each group of m consecutive tokens, whose
value is the mean of the group. The values here are Gaussian, and y is the output of a softmax row,
so that token weights reach loss 0. Two methods start from equal weights:

- gradient descent without constraints, with the step 1/λ_max(H) of each problem. Its rate is what
  a condition number describes.
- mirror descent on the simplex: b ← b·exp(−η·gradient), normalised, with η = 1/max |H_ij|.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from benchmarks.paper_parts.inputs import Inputs, rounded
from benchmarks.paper_parts.plots import label, make_figure, save
from benchmarks.paper_parts.theorems import merge
from dga_jax.evaluation.jobs import Job
from dga_jax.evaluation.report import markdown

TASK = "convergence"
GROUP_SIZES = (1, 4, 16)  # 1 is dense attention.
METHODS = ("gradient descent", "mirror descent")
_HEAD_DIM = 64
_SEED = 0


def make_jobs(
  inputs: Inputs, lengths: Sequence[int] = (256, 1024), steps: int = 1000, draws: int = 10
) -> Iterator[Job]:
  """One job for each number of keys.

  Args:
    inputs: not used.
    lengths: L, keys; multiples of the largest group.
    steps: of each method.
    draws: random problems.
  """
  del inputs
  for length in lengths:
    yield Job(
      fields={"task": TASK, "length": length},
      depends_on={
        "seed": _SEED, "steps": steps, "draws": draws, "head_dim": _HEAD_DIM,
        "group_sizes": GROUP_SIZES,
      },
      ticks=1,
      run=functools.partial(_run, length, steps, draws),
      origin="random values",
    )  # fmt: skip


def _run(length: int, steps: int, draws: int, tick: Callable[[], Any]) -> dict[str, Any]:
  rng = np.random.default_rng(_SEED)
  shown = np.unique(np.geomspace(1, steps, 40).round().astype(int))
  curves: dict[str, dict[str, list]] = {name: {} for name in METHODS}
  optima = {}
  problems = [make_problem(length, rng) for _ in range(draws)]
  for m in GROUP_SIZES:
    losses: dict[str, list[np.ndarray]] = {name: [] for name in METHODS}
    least = []
    for V_LxD, y_D in problems:
      G_kxD = merge(V_LxD, np.zeros(length), m)
      start = np.square(G_kxD.mean(axis=0) - y_D).sum()
      for name, descend in zip(METHODS, (gradient_descent, mirror_descent), strict=True):
        losses[name].append(descend(G_kxD, y_D, steps)[shown] / start)
      solution = np.linalg.lstsq(G_kxD.T, y_D, rcond=None)[0]
      least.append(np.square(solution @ G_kxD - y_D).sum() / start)
    for name in METHODS:
      curves[name][str(m)] = rounded(np.mean(losses[name], axis=0), 7)
    optima[str(m)] = round(float(np.mean(least)), 7)
  tick()
  return {"steps": shown.tolist(), "curves": curves, "optimum": optima}


def make_problem(
  length: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "L D"], Float[np.ndarray, "D"]]:
  """Gaussian values, and the output of a softmax row with normal logits of deviation 2."""
  V_LxD = rng.standard_normal((length, _HEAD_DIM))
  weight_L = np.exp(2 * rng.standard_normal(length))
  return V_LxD, weight_L / weight_L.sum() @ V_LxD


def gradient_descent(
  G_kxD: Float[np.ndarray, "k D"], y_D: Float[np.ndarray, "D"], steps: int
) -> Float[np.ndarray, "steps+1"]:
  """Losses before each step and at the end, with the step 1/λ_max of the Hessian 2 G Gᵀ."""
  b_k = np.full(len(G_kxD), 1 / len(G_kxD))
  step = 0.5 / np.linalg.norm(G_kxD, 2) ** 2
  losses = []
  for _ in range(steps + 1):
    residual_D = b_k @ G_kxD - y_D
    losses.append(residual_D @ residual_D)
    b_k = b_k - step * 2 * (G_kxD @ residual_D)
  return np.array(losses)


def mirror_descent(
  G_kxD: Float[np.ndarray, "k D"], y_D: Float[np.ndarray, "D"], steps: int
) -> Float[np.ndarray, "steps+1"]:
  """As `gradient_descent`, with multiplicative updates that keep the weights on the simplex."""
  b_k = np.full(len(G_kxD), 1 / len(G_kxD))
  step = 0.5 / np.abs(G_kxD @ G_kxD.T).max()
  losses = []
  for _ in range(steps + 1):
    residual_D = b_k @ G_kxD - y_D
    losses.append(residual_D @ residual_D)
    gradient_k = 2 * (G_kxD @ residual_D)
    b_k = b_k * np.exp(-step * (gradient_k - gradient_k.min()))
    b_k = b_k / b_k.sum()
  return np.array(losses)


def write(results: Sequence[Mapping[str, Any]], out: Path) -> str:
  """Writes convergence.png to a folder; returns the table."""
  results = sorted(results, key=lambda result: result["length"])
  title = f"The paper's least-squares problem, D = {_HEAD_DIM}: loss over its first value"
  figure, panels = make_figure(2 * len(results), title)
  places = [(result, name) for result in results for name in METHODS]
  for axes, (result, name) in zip(panels, places, strict=True):
    for index, m in enumerate(GROUP_SIZES):
      axes.plot(
        result["steps"], result["curves"][name][str(m)], f"C{index}",
        label="dense" if m == 1 else f"groups of {m}",
      )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(1e-4, 1.5)
    axes.legend(fontsize=8, loc="lower left")
    label(axes, f"{name}, L = {result['length']}", "step", "loss")
  save(figure, out / "convergence.png")
  return _table(results)


def _table(results: Sequence[Mapping[str, Any]]) -> str:
  rows = []
  for result in results:
    for m in GROUP_SIZES:
      name = "dense" if m == 1 else f"groups of {m}"
      row = [str(result["length"]), name, f"{result['optimum'][str(m)]:.3f}"]
      for method in METHODS:
        losses = dict(zip(result["steps"], result["curves"][method][str(m)], strict=True))
        at = [_nearest(goal, list(losses)) for goal in (10, 100, 1000)]
        row.append(", ".join(f"{losses[step]:.2g}" for step in at))
      rows.append(row)
  header = ["L", "weights", "smallest loss without constraints"]
  header += [f"{name}: loss after 10, 100, 1000 steps" for name in METHODS]
  return markdown(header, rows)


def _nearest(goal: int, steps: Sequence[int]) -> int:
  """The first of the steps that are nearest to a goal."""
  return min(steps, key=lambda step: abs(step - goal))
