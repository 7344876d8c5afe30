"""Tables and pictures of `sparsity`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper_parts.plots import label, make_figure, save
from benchmarks.paper_parts.published import P_SPARSE
from benchmarks.paper_parts.sparsity import merge_lengths, SINKS, WINDOW
from dga_jax.evaluation.report import markdown

type _Results = Sequence[Mapping[str, Any]]

_COLOURS = {"novels": "C0", "Python": "C1"}
_SHOWN = (100, 200, 500, 1000, 2000, 4000, 8000)


def write(results: _Results, out: Path) -> str:
  """Writes sparsity.png and sinks.png to a folder; returns the tables."""
  groups = sorted({(r["weights"], r["corpus"]) for r in results}, reverse=True)
  merged = {
    group: merge_lengths([r for r in results if (r["weights"], r["corpus"]) == group])
    for group in groups
  }
  _plot_sparsity(merged, out / "sparsity.png")
  for corpus in dict.fromkeys(corpus for weights, corpus in groups if weights == "trained"):
    own = [r for r in results if (r["weights"], r["corpus"]) == ("trained", corpus)]
    longest = max(own, key=lambda result: result["length"])
    _plot_sinks(longest, out / f"sinks_{corpus.lower()}.png")
  return f"{_p_sparse_table(merged)}\n\n{_mass_table(merged)}"


def _p_sparse_table(merged: Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]) -> str:
  lengths = [n for n in _SHOWN if any(n in group for group in merged.values())]
  rows = []
  for corpus in ("WikiText-2", "SlimPajama"):
    published = dict(zip(P_SPARSE["length"], P_SPARSE[corpus], strict=True))
    values = [f"{published[n]:.2f}" if n in published else "" for n in lengths]
    rows.append([f"paper, {corpus}", "0.01", *values])
  for (weights, corpus), by_length in merged.items():
    for rho in ("0.01", "0.1"):
      for name, words in (
        ("largest", ""), ("largest_without_sinks", f", without the first {SINKS} keys"),
        ("largest_unscaled", ", logits without 1/√D"),
      ):  # fmt: skip
        has_sinks = weights == "trained"
        if name == "largest" or (rho == "0.01" and (has_sinks or name == "largest_unscaled")):
          values = [
            f"{by_length[n]['p_sparse'][name][rho]:.2f}" if n in by_length else "" for n in lengths
          ]
          rows.append([f"{weights}, {corpus}{words}", rho, *values])
  return markdown(["P_sparse(L, ρ)", "ρ", *[f"L = {n}" for n in lengths]], rows)


def _mass_table(merged: Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]) -> str:
  names = {
    "first": "first key", "sinks": f"first {SINKS} keys",
    "window": f"{WINDOW} most recent other keys", "top_1_percent": "largest 1 % of the weights",
    "top_10_percent": "largest 10 %",
  }  # fmt: skip
  rows = []
  for (weights, corpus), by_length in merged.items():
    for length in dict.fromkeys((min(by_length), 1000, max(by_length))):
      if length not in by_length:
        continue
      mass = by_length[length]["mass"]
      rows.append([f"{weights}, {corpus}", str(length), *[f"{mass[name]:.1%}" for name in names]])
  return markdown(["attention mass", "L", *names.values()], rows)


def _plot_sparsity(
  merged: Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]], path: Path
) -> None:
  figure, (left, right) = make_figure(
    2, "ρ-sparsity of SmolLM2-135M: share of rows whose largest weight exceeds 1/(Lρ)"
  )
  for (weights, corpus), by_length in merged.items():
    lengths = sorted(by_length)
    colour = _COLOURS[corpus]
    line = "-" if weights == "trained" else ":"
    lines = [("largest", "o", "")]
    if weights == "trained":
      lines.append(("largest_without_sinks", "x", f" without the first {SINKS} keys"))
    else:
      lines.append(("largest_unscaled", "+", ", logits without 1/√D"))
    for name, marker, words in lines:
      values = [by_length[n]["p_sparse"][name]["0.01"] for n in lengths]
      dashes = line if name == "largest" else "--"
      left.plot(
        lengths, values, dashes, color=colour, marker=marker, ms=4,
        label=f"{weights}, {corpus}{words}",
      )  # fmt: skip
    if weights == "trained":
      for rho, shade in (("0.01", 1.0), ("0.05", 0.65), ("0.1", 0.4)):
        values = [by_length[n]["p_sparse"]["largest"][rho] for n in lengths]
        right.plot(lengths, values, "-", color=colour, alpha=shade, label=f"{corpus}, ρ = {rho}")
  for corpus, marker in (("WikiText-2", "s"), ("SlimPajama", "^")):
    left.plot(
      P_SPARSE["length"], P_SPARSE[corpus], marker, color="black", mfc="none", ms=5,
      label=f"paper, LLaMA2-7B, {corpus}",
    )  # fmt: skip
  label(left, "ρ = 0.01", "L, keys in the row", "P_sparse(L, ρ)")
  label(right, "Trained weights, several ρ", "L, keys in the row", "P_sparse(L, ρ)")
  for axes in (left, right):
    axes.set_xscale("log")
    axes.set_xticks([100, 200, 500, 1000, 2000, 4000, 8000])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 0.03))
  save(figure, path)


def _plot_sinks(result: Mapping[str, Any], path: Path) -> None:
  length = result["by_length"][-1]["length"]
  figure, panels = make_figure(
    3,
    f"Attention mass of SmolLM2-135M by layer and head, rows of {length} keys, {result['corpus']}",
  )
  sinks, window = (np.array(result["by_head"][name]) for name in ("sinks", "window"))
  for axes, values, title in (
    (panels[0], sinks, f"first {SINKS} keys"),
    (panels[1], window, f"{WINDOW} most recent keys"),
    (panels[2], 1 - sinks - window, "all other keys"),
  ):
    image = axes.imshow(values.T, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.grid(visible=False)
    axes.set_yticks(range(values.shape[1]))
    label(axes, f"{title}: mean {values.mean():.0%}", "layer", "query head")
  figure.colorbar(image, ax=panels, label="share of the row's weight")
  save(figure, path)
