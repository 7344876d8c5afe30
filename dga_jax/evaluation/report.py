"""Tables and plots of the results of a task."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dga_jax.evaluation import plots
from dga_jax.files.whole_file import whole_file

type _Results = Sequence[Mapping[str, Any]]


def write(
  task: str, results: _Results, out: Path, plotted: Collection[str] | None = None
) -> list[Path]:
  """Writes OUT/TASK.md and the task's plots; returns their paths.

  Args:
    task: a task of `python -m dga_jax.evaluate`.
    results: of `run_jobs`; results of other tasks are ignored.
    out: a folder that exists.
    plotted: variants with a line or map of their own in the plots; None for all. The table and the
      plot against the share of keys always show every variant.
  """
  own = [result for result in results if result["task"] == task]
  if not own:
    return []
  shown = [r for r in own if plotted is None or r["variant"] in plotted]
  table, *drawn = _WRITERS[task](own, shown, out)
  path = out / f"{task}.md"
  with whole_file(path) as partial:
    partial.write_text(f"{table}\n", encoding="utf-8")
  return [path, *drawn]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def perplexity_table(results: _Results) -> str:
  """One row a result: cache budget, perplexity, and perplexity of the last tokens both ways.

  The column "over dense" divides the perplexity of the decoded tokens by that of the variant
  "dense" at the same length.
  """
  header = [
    "variant", "length", "keys kept", "perplexity", "± (loss)",
    "last tokens: whole sequence", "last tokens: decoding", "over dense",
  ]  # fmt: skip
  dense = {r["length"]: r["last"]["decoded_loss"] for r in results if r["variant"] == "dense"}
  rows = []
  for result in results:
    last, level = result["last"], dense.get(result["length"])
    decoded = last["decoded_loss"]
    rows.append(
      [
        result["variant"],
        str(result["length"]),
        _kept(result["budget"]),
        f"{result['perplexity']:.3f}",
        "" if result["standard_error"] is None else f"{result['standard_error']:.3f}",
        f"{math.exp(last['teacher_forced_loss']):.3f}",
        f"{math.exp(decoded):.3f}" + ("" if last["measured_by_decoding"] else " (same function)"),
        "" if level is None else f"{math.exp(decoded - level):.4f}",
      ]
    )
  return markdown(header, rows)


def _kept(budget: Mapping[str, Any]) -> str:
  """Keys that are stored; and the share that a decoding step reads, where it is another one."""
  stored, read = budget["share"], budget.get("read_share", budget["share"])
  suffix = "" if read == stored else f", {read:.1%} read"
  return f"{budget['keys']:.0f} ({stored:.1%}{suffix})"


def retrieval_table(results: _Results) -> str:
  """One row a result: right answers, their share, and its 95 % interval."""
  header = ["puzzle", "variant", "length", "keys kept", "right", "share (95 %)"]
  rows = [
    [
      result["puzzle"],
      result["variant"],
      str(result["length"]),
      _kept(result["budget"]),
      f"{result['hits']} of {result['samples']}",
      f"{result['share']:.0%} ({result['low']:.0%}–{result['high']:.0%})",
    ]
    for result in results
  ]
  return markdown(header, rows)


def by_method(
  results: _Results, values: Callable[[Mapping[str, Any]], Sequence[Any]]
) -> dict[str, list[plots.Point]]:
  """Points of a plot against the share of keys kept; a method is a variant's name up to a comma.

  Args:
    results: of one task at one length.
    values: of a result: the y value and, where they are known, the bounds of its 95 % interval.
  """
  methods: dict[str, list[plots.Point]] = {}
  for result in results:
    name = result["variant"].partition(",")[0]
    point = plots.Point(result["budget"]["share"], *values(result))
    methods.setdefault(name, []).append(point)
  return methods


def title(kind: str, results: _Results) -> str:
  """The title of a plot: what it shows, the checkpoints that were measured, and the lengths.

  Args:
    kind: what the plot shows.
    results: all results of the plot.
  """
  origins = " and ".join(dict.fromkeys(str(result["origin"]) for result in results))
  lengths = sorted({result["length"] for result in results})
  span = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"
  return f"{kind} · {origins} · {span} tokens"


def passkey_values(result: Mapping[str, Any]) -> tuple[float, float, float]:
  """The share of right answers of a retrieval result, and its 95 % interval."""
  return result["share"], result["low"], result["high"]


def _decoded_perplexity(result: Mapping[str, Any]) -> tuple[float | None, ...]:
  loss = result["last"]["decoded_loss"]
  bounds = plots.interval(loss, result["last"].get("standard_error"))
  return (math.exp(loss), *(None if bound is None else math.exp(bound) for bound in bounds))


def _perplexity(results: _Results, shown: _Results, out: Path) -> list[Any]:
  drawn: list[Any] = [perplexity_table(results)]
  for length in sorted({result["length"] for result in results}):
    drawn.append(out / f"perplexity_by_share_{length}.png")
    at_length = [result for result in results if result["length"] == length]
    plots.plot_against_share(
      by_method(at_length, _decoded_perplexity),
      drawn[-1],
      y_label="Perplexity of the last tokens, by decoding",
      title=title("Perplexity by share of keys", at_length),
    )
    own = [result for result in shown if result["length"] == length]
    if own:
      drawn.append(out / f"perplexity_by_position_{length}.png")
      plots.plot_perplexity_by_position(own, drawn[-1], title=title("Perplexity by position", own))
    restarted = [result for result in own if result["restart"]]
    if restarted:
      drawn.append(out / f"restart_{length}.png")
      plots.plot_restart(restarted, drawn[-1], title=title("Loss by context", restarted))
  return drawn


def _retrieval(results: _Results, shown: _Results, out: Path) -> list[Any]:
  drawn: list[Any] = [retrieval_table(results)]
  for puzzle in dict.fromkeys(result["puzzle"] for result in shown):
    own = [result for result in shown if result["puzzle"] == puzzle]
    drawn.append(out / f"{puzzle}.png")
    plots.plot_retrieval(own, drawn[-1], title=title(puzzle, own))
    by_depth = [
      {"variant": result["variant"], "length": result["length"], **depth}
      for result in own
      for depth in result["by_depth"]
    ]
    drawn.append(out / f"{puzzle}_by_depth.png")
    plots.plot_by_depth(by_depth, drawn[-1], title=title(f"{puzzle}, by depth", own))
  return drawn


def _ruler(results: _Results, shown: _Results, out: Path) -> list[Any]:
  del shown, out
  rows = []
  for result in results:
    error = result["standard_error"]
    rows.append(
      [
        result["part"],
        result["variant"],
        str(result["length"]),
        _kept(result["budget"]),
        f"{100 * result['score']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}"),
        str(result["samples"]),
      ]
    )
  header = ["part", "variant", "length", "keys kept", "score (standard error)", "prompts"]
  return [markdown(header, rows)]


def _longbench(results: _Results, shown: _Results, out: Path) -> list[Any]:
  del shown, out
  buckets = ("0-4k", "4-8k", "8k+", "all")
  rows = [
    [result["dataset"], result["variant"], str(result["length"])]
    + ["" if (score := result["score"][name]) is None else f"{score:.2f}" for name in buckets]
    for result in results
  ]
  return [markdown(["data set", "variant", "length", *buckets], rows)]


def _lost_in_the_middle(results: _Results, shown: _Results, out: Path) -> list[Any]:
  del shown, out
  rows = [
    [
      result["variant"],
      result["documents"],
      "any" if place["gold"] is None else str(place["gold"] + 1),
      f"{place['hits']} of {place['samples']}",
      f"{place['share']:.0%} ({place['low']:.0%}–{place['high']:.0%})",
    ]
    for result in results
    for place in result["by_place"]
  ]
  header = ["variant", "documents", "position of the answer", "right", "share (95 %)"]
  return [markdown(header, rows)]


_WRITERS: dict[str, Callable[[_Results, _Results, Path], list[Any]]] = {
  "perplexity": _perplexity,
  "retrieval": _retrieval,
  "ruler": _ruler,
  "longbench": _longbench,
  "lost_in_the_middle": _lost_in_the_middle,
}
