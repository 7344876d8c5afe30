"""The result of a calibration as JSON and as a table."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dga_jax.calibration.candidates import label
from dga_jax.calibration.measuring import Divergence, SetLoss
from dga_jax.calibration.run import Calibration, make_budgets, TableRow
from dga_jax.head_budgets import FULL, write_head_budgets

_HEADER = (
  "| share | cost | full heads | | predicted | budgets | one DGA setting | sinks and window |\n"
  "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def write_json(result: Calibration, provenance: Mapping[str, Any], path: Path) -> None:
  """Writes the budgets, and under "calibration" what they were calibrated with and the losses.

  The file appears when it is complete. `dga_jax.head_budgets.read_head_budgets` reads it.

  Args:
    result: of the calibration.
    provenance: JSON values: model, length, share, objective, seed and others.
    path: of the file.
  """
  settings = [one if one == FULL else dataclasses.asdict(one) for one in result.candidates]
  calibration = {
    **provenance,
    "cost": result.share,
    "candidates": [
      {"label": label(candidate), "setting": setting, "cost_of_a_head": float(cost)}
      for candidate, setting, cost in zip(result.candidates, settings, result.costs, strict=True)
    ],
    "starts": [
      {"name": start.name, "score": score, "budgets": make_budgets(*start.set).to_dict()}
      for start, score in result.starts
    ],
    "chosen_start": result.starts[result.chosen_start][0].name,
    "score": result.improved.score,
    "changes": {"tried": result.improved.tried, "accepted": result.improved.accepted},
    "dense": _as_json(result.dense),
    "chosen": _row_as_json(result.chosen),
    "table": [_row_as_json(row) for row in result.table],
    "rise_of_text_divergence": result.rises.text.tolist(),
    "rise_of_retrieval_divergence": result.rises.retrieval.tolist(),
  }
  write_head_budgets(result.budgets, calibration, path)


def table(result: Calibration) -> str:
  """Losses over the share of the cost, in Markdown.

  Text is the perplexity over dense attention's, retrieval the loss of the answers' tokens in nats
  and the number of answers found. "Predicted" adds the divergences of single heads to dense
  attention's loss. The last row is the chosen set after its correction. Scores are
  the measured damages on the calibration rows; see `Scale.score`.
  """
  dense, improved = result.dense, result.improved
  lines = [
    f"Dense: perplexity {math.exp(dense.text):.3f}, retrieval {_retrieval(dense)}.",
    "",
    _HEADER,
  ]
  for row in result.table:
    lines += _lines(row, dense, f"{row.share:.2f}")
  lines += _lines(result.chosen, dense, f"**{result.chosen.share:.2f}, corrected**")
  lines += ["", "Scores of the first sets, lower is better:"]
  lines += [f"- {start.name}: {score:.4f}" for start, score in result.starts]
  lines.append(
    f"- {result.starts[result.chosen_start][0].name}, after {improved.accepted} of"
    f" {improved.tried} measured changes of the best starts: {improved.score:.4f}"
  )
  return "\n".join(lines)


def _lines(row: TableRow, dense: SetLoss, share: str) -> list[str]:
  sets = (row.budgets, row.one_setting, row.sinks_and_window)
  text = [f"{math.exp(row.predicted.text):.4f}"]
  text += ["-" if one is None else f"{math.exp(one.text - dense.text):.4f}" for one in sets]
  retrieval = [f"{dense.retrieval + row.predicted.retrieval:.3f}"]
  retrieval += ["-" if one is None else _retrieval(one) for one in sets]
  return [
    f"| {share} | {row.cost:.3f} | {row.full_heads} | text | {' | '.join(text)} |",
    f"| | | | retrieval | {' | '.join(retrieval)} |",
  ]


def _retrieval(loss: SetLoss) -> str:
  return f"{loss.retrieval:.3f} ({loss.found} of {loss.questions})"


def _row_as_json(row: TableRow) -> dict[str, Any]:
  return {name: _as_json(value) for name, value in row._asdict().items()}


def _as_json(value: Any) -> Any:
  """Named tuples as mappings."""
  if isinstance(value, SetLoss | Divergence):
    return {name: _as_json(one) for name, one in value._asdict().items()}
  return value
