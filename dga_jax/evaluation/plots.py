"""Plots of results, as PNG files."""

import itertools
import math
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter

from dga_jax.evaluation.scores import Z95
from dga_jax.files.figure import save_figure

_COLOURS = 10  # Of matplotlib's default cycle.
_MARKERS = "osD^vP*X<>d"  # Eleven, so that 110 styles differ in colour or marker.

# A linear axis becomes logarithmic where its values differ by more than this factor.
_LARGEST_LINEAR_RATIO = 3.0
# Values of neighbouring variants are drawn this factor apart on a logarithmic x axis.
_SHIFT = 1.015
_MAX_TICKS = 14


class Point(NamedTuple):
  """One setting of a method.

  Attributes:
    share: of the keys that the method keeps, from 0 to 1.
    value: the y value.
    low: lower bound of the 95 % interval of `value`; None where it is not known.
    high: upper bound of the interval.
  """

  share: float
  value: float
  low: float | None = None
  high: float | None = None


def interval(mean: float, standard_error: float | None) -> tuple[float, float] | tuple[None, None]:
  """The 95 % interval of a mean; (None, None) where the standard error is not known."""
  if standard_error is None:
    return None, None
  return mean - Z95 * standard_error, mean + Z95 * standard_error


def plot_perplexity_by_position(
  results: Sequence[Mapping[str, Any]], path: Path, *, title: str
) -> None:
  """Perplexity against the position in the context, one line a variant, with 95 % intervals.

  Args:
    results: of `measure_perplexity`, each with "variant".
    path: of the PNG file.
    title: of the plot.
  """
  figure, axes = _figure("Position in the context (tokens)", "Perplexity", title)
  for place, result in enumerate(results):
    style = _style(place)
    pieces = result["by_position"]
    middles = [(piece["from"] + piece["to"]) / 2 for piece in pieces]
    axes.plot(
      middles, [math.exp(piece["loss"]) for piece in pieces], label=result["variant"], **style
    )
    if all(piece.get("standard_error") is not None for piece in pieces):
      bounds = [interval(piece["loss"], piece["standard_error"]) for piece in pieces]
      low, high = np.exp(np.array(bounds, float)).T
      axes.fill_between(middles, low, high, color=style["color"], alpha=0.12, linewidth=0)
  _choose_scale(axes)
  _legend(axes)
  save_figure(figure, path)


def plot_restart(results: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
  """Loss on the same last tokens against the length of the context before them.

  Args:
    results: as for `plot_perplexity_by_position`.
    path: of the PNG file.
    title: of the plot.
  """
  figure, axes = _figure(
    "Context before the target tokens", "Loss on the targets (nats per token)", title
  )
  contexts: set[float] = set()
  for place, result in enumerate(results):
    last = result["last"]
    whole = {
      "context": result["length"] - last["targets"],
      "loss": last["teacher_forced_loss"],
      "standard_error": last.get("standard_error"),
    }
    points = sorted([*result["restart"], whole], key=lambda one: one["context"])
    contexts.update(one["context"] for one in points)
    _draw_with_intervals(
      axes,
      [one["context"] * _shift(place, len(results)) for one in points],
      [one["loss"] for one in points],
      [interval(one["loss"], one.get("standard_error")) for one in points],
      label=result["variant"],
      style=_style(place),
    )
  _use_log_axis(axes, contexts, "{:.0f}".format)
  _legend(axes)
  save_figure(figure, path)


def plot_against_share(
  methods: Mapping[str, Sequence[Point]],
  path: Path,
  *,
  y_label: str,
  title: str,
  from_0_to_1: bool = False,
) -> None:
  """A measure of quality against the share of the keys that a method keeps, one line a method.

  A method that keeps all keys is a horizontal line with a band. A method with several settings at
  the same share has points without a line. The points of different methods at the same share are
  drawn side by side.

  Args:
    methods: the points of each method.
    path: of the PNG file.
    y_label: label of the y axis.
    title: of the plot.
    from_0_to_1: whether the y values are shares; the y axis then covers 0 to 1.
  """
  figure, axes = _figure("Share of the keys kept", y_label, title)
  every_share: set[float] = set()
  for place, (name, points) in enumerate(methods.items()):
    style = _style(place)
    points = sorted(points, key=lambda point: point.share)
    shares = [point.share for point in points]
    if shares[0] > 0.99:
      axes.axhline(points[0].value, label=name, color=style["color"], linestyle="--")
      if points[0].low is not None and points[0].high is not None:
        axes.axhspan(points[0].low, points[0].high, color=style["color"], alpha=0.12, linewidth=0)
      continue
    if any(b < 1.02 * a for a, b in itertools.pairwise(shares)):
      style["linestyle"] = ""
    every_share.update(shares)
    _draw_with_intervals(
      axes,
      [share * _shift(place, len(methods)) for share in shares],
      [point.value for point in points],
      [(point.low, point.high) for point in points],
      label=name,
      style=style,
    )
  _use_log_axis(axes, every_share or {1.0}, lambda share: f"{100 * share:.3g} %")
  if from_0_to_1:
    _cover_shares(axes)
  else:
    _choose_scale(axes)
  _legend(axes)
  save_figure(figure, path)


def plot_retrieval(results: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
  """Share of right answers against the length, with 95 % intervals, one line a variant.

  Args:
    results: each with "variant", "length" and the fields of `exact_match`; one for each pair.
    path: of the PNG file.
    title: of the plot.
  """
  figure, axes = _figure("Length of the prompt (tokens)", "Answered right", title)
  # The intervals of different variants are drawn side by side.
  _draw_shares(axes, results, "length", shift=lambda x, place: x * _SHIFT**place)
  _use_log_axis(axes, {result["length"] for result in results}, "{:.0f}".format)
  _legend(axes)
  save_figure(figure, path)


def plot_by_depth(results: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
  """Share of right answers by depth and length.

  Several lengths are heat maps, one a variant. One length is a plot against the depth with 95 %
  intervals.

  Args:
    results: as for `plot_retrieval`, each also with "depth".
    path: of the PNG file.
    title: of the plot.
  """
  if len({result["length"] for result in results}) > 1:
    _plot_heat_maps(results, path, title)
    return
  figure, axes = _figure("Depth of the answer in the prompt", "Answered right", title)
  _draw_shares(axes, results, "depth", shift=lambda x, place: x + 0.004 * place)
  axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
  _legend(axes)
  save_figure(figure, path)


def plot_by_layer(
  losses: Mapping[str, Sequence[float]],
  path: Path,
  *,
  y_label: str,
  title: str,
  baselines: Mapping[str, float],
  standard_errors: Mapping[str, Sequence[float] | None],
) -> None:
  """A loss against the layer that was changed, one line an ablation; baselines are horizontal.

  Args:
    losses: for each ablation the loss of every layer.
    path: of the PNG file.
    y_label: label of the y axis.
    title: of the plot.
    baselines: names and losses of horizontal lines.
    standard_errors: of the losses of each ablation; None where they are not known.
  """
  figure, axes = _figure("Layer", y_label, title)
  for place, (name, values) in enumerate(losses.items()):
    errors: Sequence[float | None] = standard_errors[name] or [None] * len(values)
    bounds = [interval(value, error) for value, error in zip(values, errors, strict=True)]
    _draw_with_intervals(
      axes, list(range(len(values))), values, bounds, label=name, style=_style(place)
    )
  for name, value in baselines.items():
    axes.axhline(value, color="black", linestyle="--" if "dense" in name else ":", label=name)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  _legend(axes)
  save_figure(figure, path)


def _plot_heat_maps(results: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
  names = list(dict.fromkeys(result["variant"] for result in results))
  lengths = sorted({result["length"] for result in results})
  depths = sorted({result["depth"] for result in results})
  columns = min(4, len(names))
  rows = -(-len(names) // columns)
  width, height = 1.6 + 0.62 * len(lengths), 1.2 + 0.3 * len(depths)
  figure = Figure(
    figsize=(max(6.0, 0.8 + columns * width), 0.9 + rows * height), dpi=120, layout="constrained"
  )
  figure.suptitle(title, fontsize=10, parse_math=False)
  for place, name in enumerate(names):
    axes = figure.add_subplot(rows, columns, place + 1)
    own = {(r["depth"], r["length"]): r["share"] for r in results if r["variant"] == name}
    shares = np.array([[own.get((depth, n), np.nan) for n in lengths] for depth in depths])
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
      if not np.isnan(share):
        colour = text_colour([float(part) for part in image.to_rgba(share)[:3]])
        label = f"{100 * share:.0f}"
        axes.text(column, row, label, ha="center", va="center", fontsize=8, color=colour)
    axes.set_title(textwrap.fill(name, width=int(12 * width)), fontsize=8, parse_math=False)
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=7)
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=7)
    axes.tick_params(labelleft=place % columns == 0)
    if place % columns == 0:
      axes.set_ylabel("Depth", fontsize=8)
    if place + columns >= len(names):
      axes.set_xlabel("Length (tokens)", fontsize=8)
  percent = PercentFormatter(xmax=1, symbol=" %")
  figure.colorbar(image, ax=figure.axes, label="Answered right", format=percent, shrink=0.8)
  save_figure(figure, path)


def text_colour(background: Sequence[float]) -> str:
  """Black or white, whichever has the higher contrast on a colour (WCAG 2.1).

  Args:
    background: red, green and blue from 0 to 1 (sRGB).
  """
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background]
  luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
  return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


def _draw_shares(
  axes: Axes,
  results: Sequence[Mapping[str, Any]],
  x_name: str,
  *,
  shift: Callable[[float, float], float],
) -> None:
  """Lines of shares from 0 to 1 with their intervals, one a variant, moved apart by `shift`."""
  names = list(dict.fromkeys(result["variant"] for result in results))
  for place, name in enumerate(names):
    own = sorted((r for r in results if r["variant"] == name), key=lambda r: r[x_name])
    _draw_with_intervals(
      axes,
      [shift(result[x_name], place - (len(names) - 1) / 2) for result in own],
      [result["share"] for result in own],
      [(result["low"], result["high"]) for result in own],
      label=name,
      style=_style(place),
    )
  _cover_shares(axes)


def _cover_shares(axes: Axes) -> None:
  axes.set_ylim(-0.03, 1.03)
  axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")


def _draw_with_intervals(
  axes: Axes,
  x: Sequence[float],
  y: Sequence[float],
  bounds: Sequence[tuple[float | None, float | None]],
  *,
  label: str,
  style: Mapping[str, Any],
) -> None:
  """A line with vertical bars; a point whose interval is not known has no bar."""
  below = [0.0 if low is None else value - low for value, (low, _) in zip(y, bounds, strict=True)]
  above = [
    0.0 if high is None else high - value for value, (_, high) in zip(y, bounds, strict=True)
  ]
  errors = np.maximum([below, above], 0)  # Rounding may move a bound past the value.
  axes.errorbar(x, y, yerr=errors, label=label, capsize=2, elinewidth=0.8, **style)


def _figure(x_label: str, y_label: str, title: str) -> tuple[Figure, Axes]:
  # A figure made without pyplot has no global state and needs no display.
  figure = Figure(figsize=(9, 5.2), dpi=120, layout="constrained")
  axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
  axes.set_title(textwrap.fill(title, width=100), fontsize=10, parse_math=False)
  axes.grid(alpha=0.3)
  return figure, axes


def _style(place: int) -> dict[str, Any]:
  return {
    "color": f"C{place % _COLOURS}",
    "marker": _MARKERS[place % len(_MARKERS)],
    "linestyle": "-" if place < _COLOURS else "-.",
    "markersize": 4,
    "linewidth": 1.4,
  }


def _shift(place: int, count: int) -> float:
  """The factor for the x values of one of `count` variants on a logarithmic axis."""
  return _SHIFT ** (place - (count - 1) / 2)


def _use_log_axis(axes: Axes, values: Collection[float], text: Callable[[float], str]) -> None:
  """Makes the x axis logarithmic, with ticks at the values, the largest of close ones."""
  low, high = min(values), max(values)
  gap = (high / low) ** (1 / _MAX_TICKS)
  ticks: list[float] = []
  for value in sorted(values, reverse=True):
    if not ticks or value * gap <= ticks[-1]:
      ticks.append(value)
  axes.set_xscale("log")
  axes.set_xticks(ticks, [text(tick) for tick in ticks])
  axes.minorticks_off()
  if low == high:
    axes.set_xlim(low / 1.2, high * 1.2)


def _choose_scale(axes: Axes) -> None:
  """Makes the y axis logarithmic where outliers would compress the other lines."""
  low, high = axes.dataLim.intervaly
  if low > 0 and high > _LARGEST_LINEAR_RATIO * low:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    # Up to 99 decades, labels at 2, 3, 4 and 6 times a power of ten: those of 7, 8 and 9 overlap.
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(99, 0)))
    axes.tick_params(axis="y", which="minor", labelsize=7)


def _legend(axes: Axes) -> None:
  legend = axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
  for text in legend.get_texts():  # Names of variants may have dollar signs.
    text.set_parse_math(False)
