r"""Measures a model's quality on long contexts, for several attention kinds.

  dga evaluate --workdir=runs/mine --task=perplexity --documents=texts.jsonl
  dga evaluate --workdir=runs/mine --task=retrieval --documents=texts.jsonl \
    --lengths=1024,2048 --variants='[{"name": "dense", "attention": "dense"},
      {"name": "window", "attention": "streaming_llm", "keys": 0.25}]'

Tasks:
  perplexity   Loss by position in the documents, loss of the last tokens with
               less context (--contexts), and loss of the last tokens decoded
               token by token. The latter differs from the loss over whole
               sequences if later queries choose what earlier queries see, as
               with selection="global".
  retrieval    Facts hidden in the documents (--puzzles), at --depths of prompts
               of --lengths tokens.
  ruler        RULER (Hsieh et al.): tasks made from the documents
               (--ruler_tasks), and questions of SQuAD or HotpotQA
               (--ruler_questions). The score is the mean share of the answers
               that are found.
  longbench    LongBench-E, from the files in the folder --longbench.
  lost_in_the_middle
               Questions about many documents (Liu et al.), from the file
               --questions.

Each result is appended to OUT/TASK.jsonl as soon as it is measured. The same
command continues after an interruption. A table (OUT/TASK.md) and plots show
all results of the model's weights; results of other weights, such as an earlier
step's, stay in the file. Plots need the extra "evaluate" (matplotlib).
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from absl import app, flags

from dga_jax import command_line
from dga_jax.choices import WeightName
from dga_jax.config_dataclasses import LARGEST_COUNT
from dga_jax.evaluation.retrieval import TASKS
from dga_jax.evaluation.ruler import RULER_TASKS
from dga_jax.files.path_flags import define_path, define_paths
from dga_jax.flag_help import FlagGroups

_GROUPS = FlagGroups()

_GROUPS.start("Model")
_WORKDIR = define_path(
  "workdir", None, "Folder of a checkpoint, a Hugging Face folder, or a GGUF file.", required=True
)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_BUDGETS = command_line.define_budgets()
_WEIGHTS = command_line.define_weights()
_VARIANTS = flags.DEFINE_string(
  "variants", None, "Names and config overrides, as JSON or a JSON file; default: the model as is."
)

_GROUPS.start("Task")
_TASK = flags.DEFINE_enum(
  "task", None, ["perplexity", "retrieval", "ruler", "longbench", "lost_in_the_middle"],
  "What to measure; see above.", required=True,
)  # fmt: skip
_OUT = define_path("out", None, "Folder for results; default: WORKDIR/evaluation.")
_DOCUMENTS = define_paths(
  "documents", "Files: .jsonl with id and text (also .xz, .gz, .bz2), or .txt."
)
_LENGTHS = flags.DEFINE_list("lengths", ["2048"], "Sequence lengths in tokens.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Sequences in a batch.", lower_bound=1)
_SEED = flags.DEFINE_integer(
  "seed", 0, "retrieval and ruler: seed of texts, facts and their places."
)

_GROUPS.start("Perplexity")
_ROWS = flags.DEFINE_integer(
  "rows_per_document", 1, "perplexity: largest number of rows from one document.", lower_bound=1
)
_TARGETS = flags.DEFINE_integer(
  "targets", 256, "perplexity: last tokens of a row that are decoded.", lower_bound=2
)
_CONTEXTS = flags.DEFINE_list(
  "contexts", [], "perplexity: tokens of context before the targets, for the restart control."
)

_GROUPS.start("Retrieval and RULER")
_PUZZLES = flags.DEFINE_list("puzzles", list(TASKS), "retrieval: names of puzzles.")
_DEPTHS = flags.DEFINE_list(
  "depths", ["0", "0.25", "0.5", "0.75", "1"], "retrieval: depths of the answer, from 0 to 1."
)
_SAMPLES = flags.DEFINE_integer(
  "samples", 4, "retrieval: prompts per depth; ruler: prompts per task.", lower_bound=1
)
_RULER_TASKS = flags.DEFINE_list("ruler_tasks", list(RULER_TASKS), "ruler: tasks made by code.")
_RULER_QUESTIONS = define_path(
  "ruler_questions", None, "ruler: file of SQuAD or HotpotQA; its first --samples questions."
)

_GROUPS.start("LongBench-E and questions about many documents")
_LONGBENCH = define_path("longbench", None, "Folder with LongBench-E's files.")
_QUESTIONS = define_path("questions", None, "File with the questions of Liu et al.")
_LIMIT = flags.DEFINE_integer("limit", None, "Largest number of examples of a file.", lower_bound=1)

# The flag that names a task's files, if it is not --documents.
_NEEDED: dict[str | None, flags.FlagHolder] = {
  "longbench": _LONGBENCH,
  "lost_in_the_middle": _QUESTIONS,
}


def main() -> None:
  """Measures the results that the file lacks, then writes the table and plots."""
  _check_flags()

  from dga_jax.evaluation import report
  from dga_jax.evaluation.jobs import run_jobs
  from dga_jax.evaluation.results import Results

  out = Path(_OUT.value or Path(_WORKDIR.value) / "evaluation")
  results = Results(out / f"{_TASK.value}.jsonl")
  jobs, origin, weights = _make_jobs()
  failed = run_jobs(jobs, results, origin=origin)
  own = [result for result in results.all() if _weights_of(result) == weights]
  for path in report.write(_TASK.value, own, out):
    print(path)
  if failed:
    raise ValueError(f"{failed} of {len(jobs)} jobs failed; their messages are above.")


def _check_flags() -> None:
  """Raises UsageError or ValueError for flags that are missing or wrong, before any import."""
  needed = _NEEDED.get(_TASK.value, _DOCUMENTS)
  if _TASK.value == "ruler" and not _RULER_TASKS.value:
    needed = _RULER_QUESTIONS
  if not needed.value:
    raise app.UsageError(f"--task={_TASK.value} needs --{needed.name}.")
  if _OUT.value is None and Path(_WORKDIR.value).is_file():
    raise app.UsageError(f"--workdir={_WORKDIR.value} is a file; give --out for the results.")
  for flag, kind, least, most in (
    (_LENGTHS, int, 1, LARGEST_COUNT),
    (_CONTEXTS, int, 1, LARGEST_COUNT),
    (_DEPTHS, float, 0, 1),
  ):
    if not all(least <= number <= most for number in _numbers(flag, kind)):
      raise ValueError(
        f"--{flag.name} is {','.join(flag.value)}; the numbers must be from {least} to {most}."
      )
  for flag in (_LENGTHS, _DEPTHS, _PUZZLES):
    if not flag.value:
      raise app.UsageError(f"--{flag.name} is empty; give at least one.")
  if unknown := [name for name in _PUZZLES.value if name not in TASKS]:
    raise ValueError(f"--puzzles has {unknown[0]!r}; the puzzles are {', '.join(TASKS)}.")
  if unknown := [name for name in _RULER_TASKS.value if name not in RULER_TASKS]:
    raise ValueError(f"--ruler_tasks has {unknown[0]!r}; it takes {', '.join(RULER_TASKS)}.")


def _numbers[T: (int, float)](flag: flags.FlagHolder, convert: Callable[[str], T]) -> list[T]:
  try:
    return [convert(text) for text in flag.value]
  except ValueError as error:
    raise ValueError(
      f"--{flag.name} is {','.join(flag.value)}; it must be numbers with commas between them."
    ) from error


def _weights_of(result: Mapping[str, Any]) -> str | None:
  """The hash of the weights that a result was measured with; None for a result without it."""
  depends_on = result.get("depends_on")
  return depends_on.get("weights") if isinstance(depends_on, dict) else None


def _make_jobs() -> tuple[list[Any], str, str]:
  """The jobs of the task, the name of the checkpoint that they measure, and a hash of its weights.

  The jobs depend on the hash, so that results of another checkpoint are not taken for its own.
  """
  from dga_jax.calibration.fingerprint import hash_parameters
  from dga_jax.checkpoint import list_steps
  from dga_jax.evaluation import task_jobs
  from dga_jax.evaluation.jobs import RetrievalSettings
  from dga_jax.evaluation.perplexity import PerplexitySettings
  from dga_jax.evaluation.texts import read_documents
  from dga_jax.evaluation.variants import Family, read_variants, Variant
  from dga_jax.loading import load_with_facts

  variants = read_variants(_VARIANTS.value) if _VARIANTS.value else [Variant("as trained")]
  lengths = _numbers(_LENGTHS, int)
  budgets = command_line.read_budgets(_BUDGETS)
  weights = cast(WeightName | None, _WEIGHTS.value)
  model, tokenizer, *_ = load_with_facts(
    str(_WORKDIR.value), step=_STEP.value, budgets=budgets, weights=weights
  )
  steps = list_steps(_WORKDIR.value) if _STEP.value is None else [_STEP.value]
  make = task_jobs.TaskJobs(Family(model, tokenizer.start_ids), tokenizer, variants, lengths)
  match _TASK.value:
    case "perplexity":
      rows = PerplexitySettings(_BATCH_SIZE.value, _TARGETS.value, tuple(_numbers(_CONTEXTS, int)))
      jobs = make.perplexity(read_documents(_DOCUMENTS.value), _ROWS.value, rows)
    case "retrieval":
      prompts = RetrievalSettings(
        _numbers(_DEPTHS, float), _SAMPLES.value, _SEED.value, _BATCH_SIZE.value
      )
      jobs = make.retrieval(read_documents(_DOCUMENTS.value), _PUZZLES.value, prompts)
    case "ruler":
      documents = read_documents(_DOCUMENTS.value) if _RULER_TASKS.value else []
      settings = task_jobs.RulerSettings(_SAMPLES.value, _SEED.value, _BATCH_SIZE.value)
      jobs = make.ruler(documents, _RULER_TASKS.value, _RULER_QUESTIONS.value, settings)
    case "longbench":
      jobs = make.longbench(str(_LONGBENCH.value), _LIMIT.value, _BATCH_SIZE.value)
    case _:
      jobs = make.lost_in_the_middle(str(_QUESTIONS.value), _LIMIT.value, _BATCH_SIZE.value)
  origin = str(_WORKDIR.value) + "".join(f", step {step}" for step in steps[-1:])
  origin += "" if budgets is None else f", budgets {_BUDGETS.value}"
  origin += "" if weights is None else f", weights {weights}"
  digest = hash_parameters(model)
  own = [
    dataclasses.replace(job, depends_on={"weights": digest, "settings": job.depends_on})
    for job in jobs
  ]
  return own, origin, digest


if __name__ == "__main__":
  command_line.run(main, _GROUPS)
