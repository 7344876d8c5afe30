"""Plots of a run: the loss by step, and by position in the context."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dga_jax.files.figure import save_figure
from train.metrics import read_metrics

LOSS_FILE = "loss.png"
POSITION_FILE = "loss_by_position.png"


def plot_run(workdir: Path, *, title: str) -> None:
  """Draws WORKDIR/loss.png and WORKDIR/loss_by_position.png from metrics.jsonl.

  Args:
    workdir: folder with metrics.jsonl.
    title: of both plots: the run, the attention kind and the sequence length.
  """
  records = read_metrics(workdir)
  train = [record for record in records if _is_number(record.get("loss"))]
  held_out = [record for record in records if _is_number(record.get("eval_loss"))]
  _plot_loss(workdir / LOSS_FILE, train, held_out, title)
  by_position = [record for record in held_out if _has_positions(record)]
  if by_position:
    _plot_positions(workdir / POSITION_FILE, by_position, title)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float)


def _has_positions(record: dict[str, Any]) -> bool:
  losses = record.get("eval_loss_by_position")
  return isinstance(losses, dict) and all(start.isdecimal() for start in losses)


def smooth(values_N: Float[np.ndarray, "N"], span: float) -> Float[np.ndarray, "N"]:
  """Exponential moving average over about `span` values, corrected for its start at 0."""
  decay = 1 - 1 / max(span, 1.0)
  total = weight = 0.0
  smoothed = []
  for value in values_N:
    total = decay * total + value
    weight = decay * weight + 1
    smoothed.append(total / weight)
  return np.array(smoothed)


def _plot_loss(path: Path, train: list[dict], held_out: list[dict], title: str) -> None:
  figure, axes = _figure("Step", "Loss (nats per token)", f"Loss · {title}")
  if train:
    steps = [record["step"] for record in train]
    losses = np.array([record["loss"] for record in train])
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, a step")
    smoothed = smooth(losses, span=len(losses) / 50)
    axes.plot(steps, smoothed, color="tab:blue", label="training, smoothed")
  if held_out:
    steps = [record["step"] for record in held_out]
    losses = np.array([record["eval_loss"] for record in held_out])
    axes.plot(steps, losses, "o--", color="tab:orange", markersize=4, label="held out")
  axes.legend()
  save_figure(figure, path)


def _plot_positions(path: Path, held_out: list[dict], title: str) -> None:
  figure, axes = _figure(
    "Position in the context (tokens)",
    "Held-out loss (nats per token)",
    f"Held-out loss by position · {title}",
  )
  shown = held_out[:: max(1, (len(held_out) - 1) // 4)][:-1] + held_out[-1:]
  for index, record in enumerate(shown):
    starts = [int(start) for start in record["eval_loss_by_position"]]
    losses = list(record["eval_loss_by_position"].values())
    shade = 0.25 + 0.75 * (index + 1) / len(shown)
    # The x value of a bucket is its middle.
    middles = [max(8.0, 1.5 * start) for start in starts]
    axes.plot(
      middles, losses, "o-", color="tab:orange", alpha=shade, label=f"step {record['step']}"
    )
  axes.set_xscale("log", base=2)
  axes.xaxis.set_major_formatter("{x:.0f}")
  axes.legend()
  save_figure(figure, path)


def _figure(x_label: str, y_label: str, title: str) -> tuple[Figure, Axes]:
  # Without pyplot there is no global state, and no display is needed.
  figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
  axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
  # A folder's name may have dollar signs, which begin a formula.
  axes.set_title(textwrap.fill(title, width=90), fontsize=10, parse_math=False)
  axes.grid(alpha=0.3)
  return figure, axes
