"""What of the paper holds: sparsity, theorems, noise, convergence, cache size, m and γ.

  ./workspace bench paper --out=runs/paper --parts=theorems,cache
  ./workspace bench paper --out=runs/paper --documents=novels.jsonl

The parts repeat the analyses of the paper (arXiv 2505.22107) that need no continued pretraining, at
the size of SmolLM2-135M and on any device. Each result is appended to OUT/paper.jsonl as soon as it
is measured, with its settings, seed, versions and device. The same command continues an interrupted
run. OUT/paper.md contains the tables of all results, beside the figures of the paper, and OUT the
pictures.

Without --documents the text is the source of Python's library alone.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from benchmarks.paper_parts.inputs import Inputs
from benchmarks.paper_parts.registry import PARTS, write_report
from benchmarks.timing import environment
from dga_jax.evaluation.jobs import run_jobs
from dga_jax.evaluation.results import Results
from dga_jax.files.path_flags import define_path, define_paths

_OUT = define_path("out", None, "Folder for results.", required=True)
_SELECTED = flags.DEFINE_list("parts", list(PARTS), f"Parts to run: {', '.join(PARTS)}.")
_WORKDIR = define_path("workdir", None, "Checkpoint of the model; SmolLM2 by default.")
_DOCUMENTS = define_paths("documents", "Novels: .jsonl or .txt.")
_MAX_DOCUMENTS = flags.DEFINE_integer("max_documents", 2, "Number of novels to use.", lower_bound=1)
_JOBS = flags.DEFINE_string("jobs", "", "Run the jobs whose name matches this regular expression.")
_MINUTES = flags.DEFINE_float("minutes", None, "Start no job after this many minutes.")
flags.register_validator(
  "parts",
  lambda parts: set(parts) <= set(PARTS),
  message=f"parts are names of {', '.join(PARTS)}, with commas between them.",
)


def main(argv: Sequence[str]) -> None:
  """Runs the missing jobs of the parts, then writes tables and pictures of all results."""
  del argv
  logging.set_verbosity(logging.WARNING)
  print(environment())
  out = Path(_OUT.value)
  results = Results(out / "paper.jsonl")
  inputs = Inputs(_WORKDIR.value, _DOCUMENTS.value, _MAX_DOCUMENTS.value)
  origin = Path(_WORKDIR.value).name if _WORKDIR.value else "SmolLM2-135M-Instruct Q4_1"
  every = [job for name in _SELECTED.value for job in PARTS[name].make_jobs(inputs)]
  jobs = [job for job in every if re.search(_JOBS.value, job.label)]
  missing = run_jobs(jobs, results, origin=origin, minutes=_MINUTES.value)
  print(f"{len(jobs)} jobs are selected, {missing} of them are missing.")
  write_report(results.all(), out)


if __name__ == "__main__":
  app.run(main)
