"""Tables and picture of the ablations."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper_parts.ablations import TIMES, variants
from benchmarks.paper_parts.plots import label, make_figure, save
from benchmarks.paper_parts.published import (
  COMPLEMENTARY,
  GROUP_SIZE,
  IMPORTANCE_RATE,
  Published,
  SELECTION,
)
from dga_jax.evaluation.report import markdown

type ByVariant = Mapping[str, Mapping[str, Any]]

_HEADER = (
  "setting", "keys", "perplexity", "over dense", "accuracy", "decoded: over dense",
  "prompts, ms", "token, ms", "paper: perplexity", "paper: accuracy", "paper: latency, ms",
)  # fmt: skip


def write(results: Sequence[Mapping[str, Any]], out: Path) -> str:
  """Writes ablations.png to a folder; returns the tables of each model."""
  by_model: dict[str, dict[str, Mapping[str, Any]]] = {}
  for result in results:
    by_model.setdefault(result["model"], {})[result["variant"]] = result
  if any("dense" in own and "paper" in own for own in by_model.values()):
    _plot(by_model, out / "ablations.png")
  sections = []
  for model, own in by_model.items():
    tables = [_table(own), _complementary(own)]
    sections.append("\n\n".join([f"Model: {model}", *(table for table in tables if table)]))
  return "\n\n".join(sections)


def _table(by_name: ByVariant) -> str:
  published = {"paper": GROUP_SIZE[16]}
  published |= {f"m = {m}": values for m, values in GROUP_SIZE.items() if m != 16}
  published |= {f"γ = {g}": values for g, values in IMPORTANCE_RATE.items() if g != 0.1}
  published["random focal tokens"] = SELECTION["random"]
  dense = by_name.get("dense")
  rows = []
  for name in variants():
    if name not in by_name:
      continue
    result, theirs = by_name[name], published.get(name)
    rows.append(
      [
        "m = 16, γ = 0.1" if name == "paper" else name,
        f"{result['keys'] / result['length']:.0%}",
        f"{math.exp(np.mean(result['loss'])):.2f}",
        _ratio(result, dense, "loss"),
        f"{np.mean(result['accuracy']):.1%}",
        _ratio(result, dense, "decoded_loss"),
        *_times(by_name, name),
        *_published(theirs),
      ]
    )
  return markdown(_HEADER, rows)


def _complementary(by_name: ByVariant) -> str:
  """DGA with and without complementary tokens, beside Table 7; empty where one is missing."""
  names = {"with": "paper", "without": "no complementary tokens"}
  if not set(names.values()) <= set(by_name):
    return ""
  rows = []
  for name, variant in names.items():
    result, theirs = by_name[variant], COMPLEMENTARY[name]
    own = [
      f"{math.exp(np.mean(result['loss'])):.2f}",
      f"{math.exp(np.mean(result['decoded_loss'])):.2f}",
      f"{np.mean(result['accuracy']):.1%}",
      _times(by_name, variant)[1],
    ]
    scores = [theirs.average, theirs.summary, theirs.few_shot, theirs.milliseconds]
    rows.append([name, *own, *(f"{score:.2f}" for score in scores)])
  header = ["complementary tokens", "perplexity", "decoded", "accuracy", "token, ms"]
  header += ["paper: LongBench-E", "summary", "few shot", "ITL, ms"]
  return markdown(header, rows)


def _published(theirs: Published | None) -> tuple[str, str, str]:
  if theirs is None:
    return "", "", ""
  latency = "" if theirs.latency is None else f"{theirs.latency:.0f}"
  return f"{theirs.perplexity:.2f}", f"{theirs.accuracy:.1f}%", latency


def _ratio(result: Mapping[str, Any], dense: Mapping[str, Any] | None, loss: str) -> str:
  """The perplexity over that of dense attention; "" if that was not measured."""
  return "" if dense is None else f"{math.exp(_excess(result, dense, loss)):.3f}"


def _excess(result: Mapping[str, Any], dense: Mapping[str, Any], loss: str) -> float:
  return float(np.mean(result[loss]) - np.mean(dense[loss]))


def _times(by_name: ByVariant, name: str) -> tuple[str, str]:
  """Milliseconds of all prompts, and of a token of all sequences; "" where not measured."""
  if TIMES not in by_name:
    return "", ""
  times = by_name[TIMES]["times"][name]
  prompt, token = (1e3 * times[part] for part in ("prompt_seconds", "token_seconds"))
  return f"{prompt:.2f}", f"{token:.2f}"


def _plot(by_model: Mapping[str, ByVariant], path: Path) -> None:
  """The loss in decoding above dense attention for each model, and the paper's losses."""
  figure, panels = make_figure(2, "m and γ under global selection")
  tables: tuple[tuple[str, Mapping[float, Published], float, str], ...] = (
    ("m", GROUP_SIZE, 16, "group size m, γ = 0.1"),
    ("γ", IMPORTANCE_RATE, 0.1, "importance rate γ, m = 16"),
  )
  for axes, (symbol, table, default, words) in zip(panels, tables, strict=True):
    names = {value: "paper" if value == default else f"{symbol} = {value}" for value in table}
    for index, (model, by_name) in enumerate(by_model.items()):
      own = [value for value, name in names.items() if name in by_name]
      if "dense" not in by_name or not own:
        continue
      excess = [_excess(by_name[names[value]], by_name["dense"], "decoded_loss") for value in own]
      axes.plot(own, excess, f"C{index}o-", label=f"{model}: above dense, decoded")
    best = min(one.perplexity for one in table.values())
    axes.plot(
      list(table), [math.log(one.perplexity / best) for one in table.values()],
      "ks--", mfc="none", label="paper: above its best setting",
    )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    label(axes, "", words, "nats per token")
  panels[0].set_xscale("log", base=2)
  panels[0].xaxis.set_major_formatter("{x:.0f}")
  save(figure, path)
