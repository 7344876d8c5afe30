"""Tables and pictures of the records of a task."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dga_jax.evaluation import plots

type _Records = Sequence[Mapping[str, Any]]


def write(
  task: str, records: _Records, out: Path, pictured: Collection[str] | None = None
) -> list[Path]:
  """Writes OUT/TASK.md and the task's pictures; returns their paths.

  Args:
    task: a task of `python -m dga_jax.evaluate`.
    records: of `run_jobs`; those of other tasks are passed over.
    out: a folder that exists.
    pictured: variants that have a line or map of their own in pictures; None for all. The table
      and the picture against the share of keys hold every variant.
  """
  own = [record for record in records if record["task"] == task]
  if not own:
    return []
  shown = [r for r in own if pictured is None or r["variant"] in pictured]
  table, *drawn = _WRITERS[task](own, shown, out)
  path = out / f"{task}.md"
  path.write_text(f"{table}\n", encoding="utf-8")
  return [path, *drawn]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def perplexity_table(records: _Records) -> str:
  """One line a record: budget, perplexity, and the last tokens by both rules.

  "over dense" divides by the perplexity of the variant "dense" at the same length, by decoding.
  """
  header = [
    "variant", "length", "keys kept", "perplexity", "± (loss)",
    "last tokens: whole sequence", "last tokens: decoding", "over dense",
  ]  # fmt: skip
  dense = {r["length"]: r["last"]["decoded_loss"] for r in records if r["variant"] == "dense"}
  rows = []
  for record in records:
    last, level = record["last"], dense.get(record["length"])
    decoded = last["decoded_loss"]
    rows.append(
      [
        record["variant"],
        str(record["length"]),
        f"{record['budget']['keys']:.0f} ({record['budget']['share']:.1%})",
        f"{record['perplexity']:.3f}",
        "" if record["standard_error"] is None else f"{record['standard_error']:.3f}",
        f"{math.exp(last['teacher_forced_loss']):.3f}",
        f"{math.exp(decoded):.3f}" + ("" if last["measured_by_decoding"] else " (same function)"),
        "" if level is None else f"{math.exp(decoded - level):.4f}",
      ]
    )
  return markdown(header, rows)


def retrieval_table(records: _Records) -> str:
  """One line a record: hits, share and interval."""
  header = ["puzzle", "variant", "length", "keys kept", "right", "share (95 %)"]
  rows = [
    [
      record["puzzle"],
      record["variant"],
      str(record["length"]),
      f"{record['budget']['keys']:.0f} ({record['budget']['share']:.1%})",
      f"{record['hits']} of {record['samples']}",
      f"{record['share']:.0%} ({record['low']:.0%}–{record['high']:.0%})",
    ]
    for record in records
  ]
  return markdown(header, rows)


def by_method(records: _Records, value: Callable[[Mapping[str, Any]], float]) -> dict[str, list]:
  """Points of a picture against the share of keys: a method is a name up to its first comma."""
  methods: dict[str, list[plots.Point]] = {}
  for record in records:
    name = record["variant"].partition(",")[0]
    methods.setdefault(name, []).append(plots.Point(record["budget"]["share"], value(record)))
  return methods


def _perplexity(records: _Records, shown: _Records, out: Path) -> list[Any]:
  drawn: list[Any] = [perplexity_table(records)]
  for length in sorted({record["length"] for record in records}):
    drawn.append(out / f"perplexity_by_share_{length}.png")
    plots.plot_against_share(
      by_method(
        [record for record in records if record["length"] == length],
        lambda record: math.exp(record["last"]["decoded_loss"]),
      ),
      drawn[-1],
      y_label="Perplexity of the last tokens, by decoding",
      title=f"{length} tokens",
      focus=True,
    )
    own = [record for record in shown if record["length"] == length]
    if own:
      drawn.append(out / f"perplexity_by_position_{length}.png")
      plots.plot_perplexity_by_position(own, drawn[-1])
    if any(record["restart"] for record in own):
      drawn.append(out / f"restart_{length}.png")
      plots.plot_restart([record for record in own if record["restart"]], drawn[-1])
  return drawn


def _retrieval(records: _Records, shown: _Records, out: Path) -> list[Any]:
  drawn: list[Any] = [retrieval_table(records)]
  for puzzle in dict.fromkeys(record["puzzle"] for record in shown):
    own = [record for record in shown if record["puzzle"] == puzzle]
    drawn.append(out / f"{puzzle}.png")
    plots.plot_retrieval(own, drawn[-1], title=puzzle)
    by_depth = [
      {"variant": record["variant"], "length": record["length"], **cell}
      for record in own
      for cell in record["by_depth"]
    ]
    drawn.append(out / f"{puzzle}_by_depth.png")
    plots.plot_heat_maps(by_depth, drawn[-1], title=puzzle)
  return drawn


def _longbench(records: _Records, shown: _Records, out: Path) -> list[Any]:
  del shown, out
  buckets = ("0-4k", "4-8k", "8k+", "all")
  rows = [
    [record["dataset"], record["variant"], str(record["length"])]
    + ["" if (score := record["score"][name]) is None else f"{score:.2f}" for name in buckets]
    for record in records
  ]
  return [markdown(["data set", "variant", "length", *buckets], rows)]


def _many_documents(records: _Records, shown: _Records, out: Path) -> list[Any]:
  del shown, out
  rows = [
    [
      record["variant"],
      record["documents"],
      "any" if cell["gold"] is None else str(cell["gold"] + 1),
      f"{cell['hits']} of {cell['samples']}",
      f"{cell['share']:.0%} ({cell['low']:.0%}–{cell['high']:.0%})",
    ]
    for record in records
    for cell in record["by_place"]
  ]
  header = ["variant", "documents", "place of the answer", "right", "share (95 %)"]
  return [markdown(header, rows)]


_WRITERS: dict[str, Callable[[_Records, _Records, Path], list[Any]]] = {
  "perplexity": _perplexity,
  "retrieval": _retrieval,
  "longbench": _longbench,
  "many_documents": _many_documents,
}
