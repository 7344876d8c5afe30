"""Tables and the picture of `theorems`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.paper_parts.plots import label, make_figure, save
from benchmarks.paper_parts.theorems import HEAD_DIM, RHO, SIGMAS
from dga_jax.evaluation.report import markdown

type _Values = Sequence[Mapping[str, Any]]


def write(results: Sequence[Mapping[str, Any]], out: Path) -> str:
  """Writes theorems.png to a folder; returns the tables."""
  values = {result["theorem"]: result["values"] for result in results}
  writers = {1: (_plot_1, _table_1), 2: (_plot_2, _table_2), 3: (_plot_3, _table_3)}
  figure, panels = make_figure(3, "Theorems 1 to 3: bound and simulation")
  tables = []
  for axes, (theorem, (plot, table)) in zip(panels, writers.items(), strict=True):
    if theorem in values:
      plot(axes, values[theorem])
      axes.legend(
        fontsize=7,
        ncols=2 if theorem == 1 else 1,
        loc="upper right" if theorem == 2 else "upper left",
      )
      tables.append(table(values[theorem]))
  save(figure, out / "theorems.png")
  return "\n\n".join(tables)


def _plot_1(axes: Axes, values: _Values) -> None:
  for index, sigma in enumerate(SIGMAS):
    own = [one for one in values if one["sigma"] == sigma]
    lengths = [one["length"] for one in own]
    axes.plot(
      lengths, [one["measured"] for one in own], f"C{index}o-", label=f"measured, σ = {sigma:g}"
    )
    axes.plot(
      lengths,
      [one["bound"] for one in own],
      f"C{index}--",
      label=f"bound that holds, σ = {sigma:g}",
    )
  axes.plot(
    lengths, [one["printed"] for one in own], "k:", label="printed bound, every σ", linewidth=2
  )
  axes.set_xscale("log")
  axes.set_ylim(-0.05, 1.7)  # Room for the legend.
  axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
  label(axes, f"Theorem 1: normal logits of deviation σ, ρ = {RHO}", "L, keys", "P_sparse(L, ρ)")


def _table_1(values: _Values) -> str:
  rows = [
    [
      f"{one['sigma']:g}", str(one["length"]), f"{one['measured']:.3f}", f"{one['bound']:.3f}",
      f"{one['printed']:.3f}",
    ]
    for one in values
  ]  # fmt: skip
  return markdown(["σ", "L", "P_sparse, simulated", "bound that holds", "printed bound"], rows)


def _plot_2(axes: Axes, values: _Values) -> None:
  m = [one["m"] for one in values]
  axes.plot(m, [one["per_group"] for one in values], "C0o", label="one noise term per group")
  axes.plot(m, [1 / one**2 for one in m], "C0--", label="1/m² (the theorem)")
  axes.plot(m, [one["per_token"] for one in values], "C1s", label="independent noise per token")
  axes.plot(m, [1 / one for one in m], "C1--", label="1/m")
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  axes.xaxis.set_major_formatter("{x:.0f}")
  label(axes, "Theorem 2: noise of variance 1", "m, group size", "variance of a token's weight")


def _table_2(values: _Values) -> str:
  rows = [
    [str(one["m"]), f"{one['per_group']:.5f}", f"{1 / one['m'] ** 2:.5f}",
     f"{one['per_token']:.5f}", f"{1 / one['m']:.5f}"]
    for one in values
  ]  # fmt: skip
  header = ["m", "one noise term per group", "1/m²", "independent noise per token", "1/m"]
  return markdown(header, rows)


def _plot_3(axes: Axes, values: _Values) -> None:
  for index, m in enumerate((4, 16)):
    for weights, style in (("even", "o-"), ("uneven", "x--")):
      own = [one for one in values if one["m"] == m and one["weights"] == weights]
      axes.plot(
        [one["ratio"] for one in own], [one["median"] for one in own], style, color=f"C{index}",
        label=f"m = {m}, {weights} weights",
      )  # fmt: skip
  axes.axhline(1, color="black", linestyle=":", label="claim: at most 1")
  axes.axvspan(1.4, max(one["ratio"] for one in values), color="grey", alpha=0.12)
  axes.text(0.98, 0.02, "L > D: H is singular", fontsize=8, ha="right", transform=axes.transAxes)
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  axes.xaxis.set_major_formatter("{x:g}")
  title = f"Theorem 3: Gaussian values, D = {HEAD_DIM}, non-zero eigenvalues"
  label(axes, title, "L/D, keys over head dim", "κ(H̄)/κ(H), median")


def _table_3(values: _Values) -> str:
  rows = [
    [
      str(one["m"]),
      one["weights"],
      f"{one['ratio']:g}",
      f"{one['median']:.3g}",
      f"{one['larger']:.0%}",
    ]
    for one in values
  ]
  return markdown(["m", "weights", "L/D", "κ(H̄)/κ(H), median", "draws where κ(H̄) > κ(H)"], rows)
