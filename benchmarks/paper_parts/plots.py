"""The common form of the pictures of benchmarks/paper.py."""

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

LINES = ("-", "--", "-.", ":")


def make_figure(columns: int, title: str, height: float = 4.2) -> tuple[Figure, list[Axes]]:
  """A figure with a row of panels."""
  width = min(5.2 * columns, 15)
  figure = Figure(figsize=(width, height), dpi=76, layout="constrained")
  figure.suptitle("\n".join(textwrap.wrap(title, int(9 * width))), fontsize=11)
  panels = figure.subplots(1, columns, squeeze=False)[0]
  for axes in panels:
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
  return figure, list(panels)


def label(axes: Axes, title: str, x: str, y: str) -> None:
  """Sets the texts of a panel."""
  axes.set_title("\n".join(textwrap.wrap(title, 58)), fontsize=9)
  axes.set_xlabel(x, fontsize=9)
  axes.set_ylabel(y, fontsize=9)


def save(figure: Figure, path: Path) -> None:
  """Saves a small PNG file without the version of the library in it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, metadata={"Software": None}, pil_kwargs={"optimize": True})
