r"""The paper's analyses repeated: sparsity, theorems, noise, convergence, times, m, γ, training.

  ./workspace bench paper --out=runs/paper --parts=theorems,cache
  ./workspace bench paper --out=runs/paper --parts=itl,reordering
  ./workspace bench paper --out=runs/paper --documents=novels.jsonl
  python -m train.make_facts --texts=books.txt --output=facts.jsonl
  ./workspace bench paper --out=runs/paper --documents=novels.jsonl --parts=continued \
    --train_files=books.txt,facts.jsonl

The parts repeat the analyses of the paper (arXiv 2505.22107) at the size of SmolLM2-135M. The part
"continued" is continued pretraining, which needs a GPU and --train_files. The parts "itl" and
"reordering" measure times at the shapes of LLaMA2-7B on a GPU; on another device they are left out
with a message. The others run on any device.

Each result is appended to OUT/paper.jsonl as soon as it is measured, with its settings, seed,
versions and device. The same command continues an interrupted run. OUT/paper.md contains the tables
of all results, beside the figures of the paper, and OUT the pictures.

Without --documents the text is the source of Python's library alone.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from absl import app, flags, logging

from benchmarks.paper_parts.inputs import Ablation, Inputs
from benchmarks.paper_parts.pretraining import Pretraining
from benchmarks.paper_parts.question_sets import QuestionSets
from benchmarks.paper_parts.registry import PARTS, write_report
from benchmarks.timing import environment
from configs.smollm2_continued import DEFAULT_RUNS, RUNS
from dga_jax.choices import DtypeName
from dga_jax.evaluation.jobs import run_jobs
from dga_jax.evaluation.results import Results
from dga_jax.files.path_flags import define_path, define_paths
from train.logs import set_up_logging
from train.stop_signals import EXIT_STATUS, StoppedError, StopSignals

_OUT = define_path("out", None, "Folder for results.", required=True)
_SELECTED = flags.DEFINE_list("parts", list(PARTS), f"Parts to run: {', '.join(PARTS)}.")
_WORKDIR = define_path("workdir", None, "Checkpoint of the model; SmolLM2 by default.")
_DOCUMENTS = define_paths("documents", "Novels: .jsonl or .txt.")
_MAX_DOCUMENTS = flags.DEFINE_integer("max_documents", 2, "Number of novels to use.", lower_bound=1)
_JOBS = flags.DEFINE_string("jobs", "", "Run the jobs whose name matches this regular expression.")
_MINUTES = flags.DEFINE_float("minutes", None, "Start no job after this many minutes.")
_LENGTH = flags.DEFINE_integer("length", 2048, "Tokens of a row of the ablations.", lower_bound=2)
_LATENCY = flags.DEFINE_bool(
  "latency", False, "Also measure the times of the ablations, for 8 sequences."
)
_MODELS = define_paths(
  "models", "For the ablations: workdirs of trained models, in place of the model."
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", get_args(DtypeName), "Dtype of the activations.")
_BUDGETS = define_paths("budgets", "For the shares: JSON files of calibrated budgets.")
_TRAIN_FILES = define_paths("train_files", "For continued pretraining: books, and facts.")
_VALIDATION_FILES = define_paths(
  "validation_files", "For continued pretraining: held-out books, and held-out facts."
)
_RUNS = flags.DEFINE_list(
  "runs",
  list(DEFAULT_RUNS),
  f"Runs of continued pretraining: JSON files of head budgets, or of {', '.join(RUNS)}.",
)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of continued pretraining, one run for each.")
_LONGBENCH = define_path("longbench", None, "For continued pretraining: LongBench-E's folder.")
_QUESTIONS = define_path("questions", None, "For continued pretraining: questions of Liu et al.")
_LIMIT = flags.DEFINE_integer(
  "limit",
  None,
  "Largest number of examples of a file of --longbench and --questions.",
  lower_bound=1,
)
_STEPS = flags.DEFINE_integer("steps", 1000, "Steps of continued pretraining.", lower_bound=20)
_CACHE_DIR = define_path("cache_dir", None, "Folder of tokenized text; default: in OUT.")
for _name in ("train_files", "validation_files"):
  flags.register_validator(
    _name, lambda files: len(files) in (0, 2), message=f"{_name} are two: books and facts."
  )
flags.register_validator(
  "seeds", lambda seeds: all(map(str.isdecimal, seeds)), message="seeds are numbers."
)
flags.register_validator(
  "parts",
  lambda parts: set(parts) <= set(PARTS),
  message=f"parts are names of {', '.join(PARTS)}, with commas between them.",
)


def main(argv: Sequence[str]) -> None:
  """Runs the missing jobs of the parts, then writes tables and pictures of all results."""
  del argv
  with StopSignals() as signals:
    try:
      _run(signals)
    except (InterruptedError, StoppedError) as error:
      print(error)
      sys.exit(EXIT_STATUS)


def _run(signals: StopSignals) -> None:
  """Runs the jobs of the flags."""
  set_up_logging()
  if not _TRAIN_FILES.value:  # The trainer logs its steps.
    logging.set_verbosity(logging.WARNING)
  print(environment())
  out = Path(_OUT.value)
  results = Results(out / "paper.jsonl")
  inputs = Inputs(
    _WORKDIR.value,
    _DOCUMENTS.value,
    _MAX_DOCUMENTS.value,
    _pretraining(out),
    Ablation(_LENGTH.value, 8 if _LATENCY.value else None, tuple(_MODELS.value)),
    cast(DtypeName, _DTYPE.value),
    _BUDGETS.value,
    signals,
    out,
  )
  origin = Path(_WORKDIR.value).name if _WORKDIR.value else "SmolLM2-135M-Instruct Q4_1"
  every = [job for name in _SELECTED.value for job in PARTS[name].make_jobs(inputs)]
  jobs = [job for job in every if re.search(_JOBS.value, job.label)]
  missing = run_jobs(jobs, results, origin=origin, minutes=_MINUTES.value)
  print(f"{len(jobs)} jobs are selected, {missing} of them are missing.")
  write_report(results.all(), out)


def _pretraining(out: Path) -> Pretraining | None:
  """The runs of continued pretraining by the flags; None without --train_files."""
  if not _TRAIN_FILES.value:
    return None
  steps = _STEPS.value
  books, facts = _TRAIN_FILES.value
  return Pretraining(
    folder=out / "continued",
    cache_dir=Path(_CACHE_DIR.value or out / "continued" / "data"),
    train_files=(books, facts),
    validation_files=tuple(_VALIDATION_FILES.value),
    runs=tuple(_RUNS.value),
    seeds=tuple(map(int, _SEEDS.value)),
    question_sets=QuestionSets(_LONGBENCH.value, _QUESTIONS.value, _LIMIT.value),
    overrides={
      "num_steps": steps,
      "warmup_steps": steps // 20,
      "eval_every": -(-steps // 2),
      "checkpoint_every": -(-steps // 4),
    },
  )


if __name__ == "__main__":
  app.run(main)
