"""Scores after continued pretraining: the paper's Tables 1 and 2 beside the runs here.

The models, the data and the tasks differ, so the comparison is the percentage of dense attention's
score that a method keeps.
"""

from collections.abc import Mapping

from benchmarks.paper_parts.published import EXACT_MATCH, LONGBENCH
from dga_jax.evaluation.report import markdown

# The run of continued pretraining that stands for a method of the paper.
_RUNS: dict[str, str | None] = {
  "dense": "dense",
  "DGA": "global",
  "StreamingLLM": "window_quarter",
  "LM-Infinite": None,
  "MInference": None,
}


def table(ours: Mapping[str, Mapping[str, float]]) -> str:
  """One row for each method: the paper's scores, those of the run here, and the kept percentages.

  Args:
    ours: percentages of right answers by run and measure; may be empty.

  Returns:
    Markdown; empty where no run of a method of the paper has scores.
  """
  runs = {name: ours[run] for name, run in _RUNS.items() if run is not None and ours.get(run)}
  if not runs:
    return ""
  measures = list(dict.fromkeys(measure for scores in runs.values() for measure in scores))
  rows = []
  for name in _RUNS:
    scores = [LONGBENCH[name].average, *EXACT_MATCH[name].values()]
    dense = [LONGBENCH["dense"].average, *EXACT_MATCH["dense"].values()]
    own, base = runs.get(name, {}), runs.get("dense", {})
    rows.append(
      [
        name,
        *(_kept(score, of) for score, of in zip(scores, dense, strict=True)),
        *(_kept(own.get(measure), base.get(measure)) for measure in measures),
      ]
    )
  header = ["score (kept of dense)", "paper: LongBench-E"]
  header += [f"paper: exact match, {length // 1024}K" for length in EXACT_MATCH["dense"]]
  return markdown([*header, *(f"here: {measure}" for measure in measures)], rows)


def _kept(score: float | None, dense: float | None) -> str:
  """The score, and the percentage of dense attention's score."""
  if score is None:
    return ""
  return f"{score:.1f}" if not dense else f"{score:.1f} ({score / dense:.0%})"
