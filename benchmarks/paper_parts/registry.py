"""All parts by name, and the report of their results."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.paper_parts import (
  ablations,
  ablations_report,
  cache,
  continued,
  continued_report,
  convergence,
  itl,
  itl_report,
  noise,
  reordering,
  shares,
  sparsity,
  sparsity_report,
  theorems,
  theorems_report,
  training,
)
from benchmarks.paper_parts.inputs import Inputs
from dga_jax.evaluation.jobs import Job


class Part(NamedTuple):
  """One analysis.

  Attributes:
    make_jobs: the jobs, whose field "task" is the name of the part.
    write: writes the pictures of the part's results to a folder and returns Markdown.
  """

  make_jobs: Callable[[Inputs], Iterator[Job]]
  write: Callable[[Sequence[Mapping[str, Any]], Path], str]


PARTS = {
  "theorems": Part(theorems.make_jobs, theorems_report.write),
  "convergence": Part(convergence.make_jobs, convergence.write),
  "training": Part(training.make_jobs, training.write),
  "cache": Part(cache.make_jobs, cache.write),
  "itl": Part(itl.make_jobs, itl_report.write),
  "reordering": Part(reordering.make_jobs, reordering.write),
  "sparsity": Part(sparsity.make_jobs, sparsity_report.write),
  "ablations": Part(ablations.make_jobs, ablations_report.write),
  "noise": Part(noise.make_jobs, noise.write),
  "shares": Part(shares.make_jobs, shares.write),
  "continued": Part(continued.make_jobs, continued_report.write),
}


def write_report(results: Sequence[Mapping[str, Any]], out: Path) -> None:
  """Writes OUT/paper.md and the pictures of every part that has results."""
  sections = []
  for name, part in PARTS.items():
    own = [result for result in results if result["task"] == name]
    if own:
      sections.append(f"## {name.capitalize()}\n\n{part.write(own, out)}\n")
  out.mkdir(parents=True, exist_ok=True)  # Every job may have failed.
  path = out / "paper.md"
  path.write_text("\n".join(sections), encoding="utf-8")
  print(path)
