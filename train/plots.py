"""Pictures of a run: the loss by step, and by position in the context."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.metrics import read_metrics

LOSS_FILE = "loss.png"
POSITION_FILE = "loss_by_position.png"


def plot_run(workdir: Path) -> None:
  """Draws WORKDIR/loss.png and WORKDIR/loss_by_position.png from metrics.jsonl."""
  records = read_metrics(workdir)
  train = [record for record in records if record.get("loss") is not None]
  held_out = [record for record in records if "eval_loss" in record]
  _plot_loss(workdir / LOSS_FILE, train, held_out)
  if held_out:
    _plot_positions(workdir / POSITION_FILE, held_out)


def smooth(values_N: Float[np.ndarray, "N"], span: float) -> Float[np.ndarray, "N"]:
  """Exponential moving average over about `span` values, without a bias towards 0 at the start."""
  decay = 1 - 1 / max(span, 1.0)
  total = weight = 0.0
  smoothed = []
  for value in values_N:
    total = decay * total + value
    weight = decay * weight + 1
    smoothed.append(total / weight)
  return np.array(smoothed)


def _plot_loss(path: Path, train: list[dict], held_out: list[dict]) -> None:
  figure, axes = _figure("Step", "Loss (nats per token)")
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
  figure.savefig(path)


def _plot_positions(path: Path, held_out: list[dict]) -> None:
  figure, axes = _figure("Position in the context (tokens)", "Held-out loss (nats per token)")
  shown = held_out[:: max(1, (len(held_out) - 1) // 4)][:-1] + held_out[-1:]
  for index, record in enumerate(shown):
    starts = [int(start) for start in record["eval_loss_by_position"]]
    losses = list(record["eval_loss_by_position"].values())
    shade = 0.25 + 0.75 * (index + 1) / len(shown)
    # A bucket is drawn at its middle.
    middles = [max(8.0, 1.5 * start) for start in starts]
    axes.plot(
      middles, losses, "o-", color="tab:orange", alpha=shade, label=f"step {record['step']}"
    )
  axes.set_xscale("log", base=2)
  axes.xaxis.set_major_formatter("{x:.0f}")
  axes.legend()
  figure.savefig(path)


def _figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
  # A figure without pyplot keeps no global state and needs no display.
  figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
  axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
  axes.grid(alpha=0.3)
  return figure, axes
