"""Plots of results, as PNG files."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_MARKERS = "osD^vP*X<>"


class Point(NamedTuple):
  """One setting of a method.

  Attributes:
    share: of the keys that the method keeps, from 0 to 1.
    value: the y value.
  """

  share: float
  value: float


def plot_perplexity_by_position(results: Sequence[Mapping[str, Any]], path: Path) -> None:
  """Perplexity against the position in the context, one line a variant.

  Args:
    results: of `measure_perplexity`, each with "variant".
    path: of the PNG file.
  """
  figure, axes = _figure("Position in the context (tokens)", "Perplexity")
  for style, result in zip(_styles(len(results)), results, strict=True):
    pieces = result["by_position"]
    middles = [(piece["from"] + piece["to"]) / 2 for piece in pieces]
    values = [math.exp(piece["loss"]) for piece in pieces]
    axes.plot(middles, values, label=result["variant"], **style)
  _focus(axes)
  _legend(axes)
  figure.savefig(path)


def plot_restart(results: Sequence[Mapping[str, Any]], path: Path) -> None:
  """Loss on the same last tokens against the length of the context before them.

  Args:
    results: as for `plot_perplexity_by_position`.
    path: of the PNG file.
  """
  figure, axes = _figure("Context before the target tokens", "Loss on the targets (nats per token)")
  for style, result in zip(_styles(len(results)), results, strict=True):
    last = result["last"]
    points = [(one["context"], one["loss"]) for one in result["restart"]]
    points.append((result["length"] - last["targets"], last["teacher_forced_loss"]))
    axes.plot(*zip(*sorted(points), strict=True), label=result["variant"], **style)
  axes.set_xscale("log", base=2)
  axes.xaxis.set_major_formatter("{x:.0f}")
  _legend(axes)
  figure.savefig(path)


def plot_against_share(
  methods: Mapping[str, Sequence[Point]],
  path: Path,
  *,
  y_label: str,
  title: str = "",
  focus: bool = False,
) -> None:
  """A measure of quality against the share of the keys that a method keeps, one line a method.

  A method that keeps all keys is a horizontal line. A method with several settings at the same
  share has points without a line.

  Args:
    methods: the points of each method.
    path: of the PNG file.
    y_label: label of the y axis.
    title: of the plot.
    focus: whether the y axis ends above the bulk of the values, so that outliers do not compress
      the others.
  """
  figure, axes = _figure("Share of the keys kept", y_label)
  axes.set_title(title)
  for style, (name, points) in zip(_styles(len(methods)), methods.items(), strict=True):
    shares = sorted(point.share for point in points)
    if shares[0] > 0.99:
      axes.axhline(points[0].value, label=name, color=style["color"], linestyle="--")
      continue
    if any(b < 1.02 * a for a, b in itertools.pairwise(shares)):
      style["linestyle"] = ""
    axes.plot(*zip(*sorted(points), strict=True), label=name, **style)
  if focus:
    _focus(axes)
  axes.set_xscale("log")
  axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g} %")
  axes.xaxis.set_minor_formatter(lambda x, _: f"{100 * x:.2g} %")
  axes.tick_params(axis="x", which="minor", labelsize=7)
  axes.grid(which="minor", alpha=0.15)
  _legend(axes)
  figure.savefig(path)


def plot_retrieval(results: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
  """Share of right answers against the length, with 95 % intervals, one line a variant.

  Args:
    results: each with "variant", "length" and the fields of `exact_match`; one for each pair.
    path: of the PNG file.
    title: of the plot.
  """
  figure, axes = _figure("Length of the prompt (tokens)", "Answered right")
  names = list(dict.fromkeys(result["variant"] for result in results))
  for place, (style, name) in enumerate(zip(_styles(len(names)), names, strict=True)):
    own = sorted((r for r in results if r["variant"] == name), key=lambda r: r["length"])
    # The intervals of different variants are drawn side by side.
    x = [result["length"] * 1.015 ** (place - len(names) / 2) for result in own]
    y = np.array([result["share"] for result in own])
    below = y - [result["low"] for result in own]
    above = [result["high"] for result in own] - y
    errors = np.maximum([below, above], 0)  # Rounding may move a bound past the share.
    axes.errorbar(x, y, yerr=errors, label=name, capsize=2, elinewidth=0.8, **style)
  axes.set_xscale("log", base=2)
  axes.xaxis.set_major_formatter("{x:.0f}")
  axes.set_ylim(-0.03, 1.03)
  axes.set_title(title)
  _legend(axes)
  figure.savefig(path)


def plot_heat_maps(results: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
  """Share of right answers by depth and length, one heat map a variant.

  Args:
    results: as for `plot_retrieval`, each also with "depth".
    path: of the PNG file.
    title: of the plot.
  """
  names = list(dict.fromkeys(result["variant"] for result in results))
  lengths = sorted({result["length"] for result in results})
  depths = sorted({result["depth"] for result in results})
  columns = min(4, len(names))
  rows = -(-len(names) // columns)
  width, height = 1.6 + 0.62 * len(lengths), 1.2 + 0.3 * len(depths)
  figure = Figure(
    figsize=(0.8 + columns * width, 0.6 + rows * height), dpi=120, layout="constrained"
  )
  figure.suptitle(title)
  for place, name in enumerate(names):
    axes = figure.add_subplot(rows, columns, place + 1)
    own = {(r["depth"], r["length"]): r["share"] for r in results if r["variant"] == name}
    shares = np.array([[own.get((depth, n), np.nan) for n in lengths] for depth in depths])
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
      if not np.isnan(share):
        axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
    axes.set_title(textwrap.fill(name, width=int(12 * width)), fontsize=8)
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=7)
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=7)
    if place % columns == 0:
      axes.set_ylabel("Depth", fontsize=8)
    if place + columns >= len(names):
      axes.set_xlabel("Length (tokens)", fontsize=8)
  figure.colorbar(image, ax=figure.axes, label="Answered right", shrink=0.8)
  figure.savefig(path)


def plot_by_layer(
  losses: Mapping[str, Sequence[float]], path: Path, *, y_label: str, baselines: Mapping[str, float]
) -> None:
  """A loss against the layer that was changed, one line an ablation; baselines are horizontal.

  Args:
    losses: for each ablation the loss of every layer.
    path: of the PNG file.
    y_label: label of the y axis.
    baselines: names and losses of horizontal lines.
  """
  figure, axes = _figure("Layer", y_label)
  for style, (name, values) in zip(_styles(len(losses)), losses.items(), strict=True):
    axes.plot(range(len(values)), values, label=name, **style)
  for name, value in baselines.items():
    axes.axhline(value, color="black", linestyle="--" if "dense" in name else ":", label=name)
  _legend(axes)
  figure.savefig(path)


def _figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
  # A figure made without pyplot has no global state and needs no display.
  figure = Figure(figsize=(9, 5.2), dpi=120, layout="constrained")
  axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
  axes.grid(alpha=0.3)
  return figure, axes


def _styles(count: int) -> list[dict[str, Any]]:
  return [
    {
      "color": f"C{i % 10}",
      "marker": _MARKERS[i % len(_MARKERS)],
      "linestyle": "-" if i < 10 else "-.",
      "markersize": 4,
      "linewidth": 1.4,
    }
    for i in range(count)
  ]


def _focus(axes: Axes) -> None:
  """Ends the y axis above the bulk of the values; the legend marks the lines beyond the end."""
  values = {line: np.asarray(line.get_ydata(), float) for line in axes.get_lines()}
  top = 1.3 * np.median(np.concatenate(list(values.values())))
  if max(y.max() for y in values.values()) <= top:
    return
  axes.set_ylim(top=top)
  for line, y in values.items():
    if y.max() > top:
      line.set_label(f"{line.get_label()} ({'partly ' if y.min() <= top else ''}above)")


def _legend(axes: Axes) -> None:
  axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
