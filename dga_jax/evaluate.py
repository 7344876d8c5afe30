"""Measures a model's quality on long contexts, for one or several attention kinds at once.

  python -m dga_jax.evaluate --workdir=runs/mine --task=perplexity --documents=texts.jsonl
  python -m dga_jax.evaluate --workdir=runs/mine --task=retrieval --documents=texts.jsonl \
    --lengths=1024,2048 --variants='[{"name": "dense", "attention": "dense"},
      {"name": "sinks and window", "attention": "streaming_llm", "keys": 0.25}]'

Tasks:
  perplexity      loss by position on the documents; the same last tokens with less context
                  (--contexts); and both over whole sequences and by the rule of decoding, which
                  differ where later queries choose what stays (selection="global")
  retrieval       passkey, needle, multi_key, key_value, variable_tracking (--puzzles), hidden in
                  the documents at --depths of prompts of --lengths tokens
  longbench       LongBench-E from the folder --longbench
  many_documents  question answering over many documents (Liu et al.) from the file --questions

Results are added to OUT/TASK.jsonl cell by cell, and the same command goes on where it stopped.
Pictures and a table (OUT/TASK.md) are drawn from all that the file holds; they need the extra
"evaluate" (matplotlib).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import app, flags, logging

from dga_jax.checkpoint import CheckpointError, list_steps, load_model
from dga_jax.evaluation import jobs, longbench, lost_in_the_middle, report
from dga_jax.evaluation.perplexity import PerplexitySettings
from dga_jax.evaluation.results import Results
from dga_jax.evaluation.retrieval import Haystack, TASKS
from dga_jax.evaluation.texts import read_documents, token_rows
from dga_jax.evaluation.variants import Family, read_variants, Variant
from dga_jax.tokenizer import Tokenizer

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint; default: the newest.")
_TASK = flags.DEFINE_enum(
  "task", None, ["perplexity", "retrieval", "longbench", "many_documents"], "See above.",
  required=True,
)  # fmt: skip
_OUT = flags.DEFINE_string("out", None, "Folder for results; default: WORKDIR/evaluation.")
_VARIANTS = flags.DEFINE_string(
  "variants", None, "JSON, or a file of it: names and overrides; default: the model as it is."
)
_DOCUMENTS = flags.DEFINE_list("documents", [], "Files: .jsonl with id and text (.xz, .gz), .txt.")
_LENGTHS = flags.DEFINE_list("lengths", ["2048"], "Tokens of a sequence.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Sequences that run together.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows_per_document", 1, "perplexity: pieces.", lower_bound=1)
_TARGETS = flags.DEFINE_integer("targets", 256, "perplexity: last tokens decoded.", lower_bound=2)
_CONTEXTS = flags.DEFINE_list("contexts", [], "perplexity: contexts of the restart control.")
_PUZZLES = flags.DEFINE_list("puzzles", list(TASKS), "retrieval: which.")
_DEPTHS = flags.DEFINE_list("depths", ["0", "0.25", "0.5", "0.75", "1"], "retrieval: where.")
_SAMPLES = flags.DEFINE_integer("samples", 4, "retrieval: prompts per depth.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "retrieval: of what is hidden, where, and what is asked.")
_LONGBENCH = flags.DEFINE_string("longbench", None, "Folder of LongBench-E's files.")
_QUESTIONS = flags.DEFINE_string("questions", None, "File of Liu et al.'s questions.")
_LIMIT = flags.DEFINE_integer("limit", None, "At most so many examples of a file.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
  """Measures what the file of results lacks, then draws."""
  if len(argv) > 1:
    raise app.UsageError(f"{argv[1]!r} is no flag; quote values that hold spaces.")
  logging.set_verbosity(logging.WARNING)  # The checkpoint library reports every read.
  try:
    out = Path(_OUT.value or Path(_WORKDIR.value) / "evaluation")
    records = Results(out / f"{_TASK.value}.jsonl")
    model, _, tokenizer = load_model(_WORKDIR.value, _STEP.value)
    family = Family(model, tokenizer.start_ids)
    step = list_steps(_WORKDIR.value)[-1] if _STEP.value is None else _STEP.value
    asked = list(_MAKERS[_TASK.value](family, tokenizer))
    missing = jobs.run_jobs(asked, records, origin=f"{_WORKDIR.value}, step {step}")
    for path in report.write(_TASK.value, records.all(), out):
      print(path)
    if missing:
      raise SystemExit(f"error: {missing} of {len(asked)} cells failed; their messages are above.")
  except (CheckpointError, ValueError, OSError) as error:
    raise SystemExit(f"error: {error}") from error


def _variants() -> list[Variant]:
  return read_variants(_VARIANTS.value) if _VARIANTS.value else [Variant("as trained")]


def _lengths() -> list[int]:
  return [int(length) for length in _LENGTHS.value]


def _perplexity(family: Family, tokenizer: Tokenizer) -> Iterator[jobs.Job]:
  documents = read_documents(_DOCUMENTS.value)
  contexts = tuple(int(context) for context in _CONTEXTS.value)
  settings = PerplexitySettings(_BATCH_SIZE.value, _TARGETS.value, contexts)
  for length in _lengths():
    rows = token_rows(documents, tokenizer, length, _ROWS.value)
    for variant in _variants():
      yield jobs.perplexity_job(family, variant, rows, settings)


def _retrieval(family: Family, tokenizer: Tokenizer) -> Iterator[jobs.Job]:
  hay = Haystack([document.text for document in read_documents(_DOCUMENTS.value)], tokenizer)
  depths = [float(depth) for depth in _DEPTHS.value]
  settings = jobs.RetrievalSettings(depths, _SAMPLES.value, _SEED.value, _BATCH_SIZE.value)
  for puzzle in _PUZZLES.value:
    for length in _lengths():
      for variant in _variants():
        yield jobs.retrieval_job(family, tokenizer, hay, variant, puzzle, length, settings)


def _longbench(family: Family, tokenizer: Tokenizer) -> Iterator[jobs.Job]:
  if _LONGBENCH.value is None:
    raise app.UsageError("--task=longbench wants --longbench, the folder of its files.")
  for one in longbench.read_sets(_LONGBENCH.value, _LIMIT.value):
    for length in _lengths():
      for variant in _variants():
        yield jobs.longbench_job(family, tokenizer, one, variant, length, _BATCH_SIZE.value)


def _many_documents(family: Family, tokenizer: Tokenizer) -> Iterator[jobs.Job]:
  if _QUESTIONS.value is None:
    raise app.UsageError("--task=many_documents wants --questions, a file of its format.")
  questions = lost_in_the_middle.read_questions(_QUESTIONS.value, _LIMIT.value)
  for length in _lengths():
    for variant in _variants():
      yield jobs.lost_in_the_middle_job(
        family, tokenizer, questions, variant, length, _BATCH_SIZE.value
      )


_MAKERS = {
  "perplexity": _perplexity,
  "retrieval": _retrieval,
  "longbench": _longbench,
  "many_documents": _many_documents,
}


if __name__ == "__main__":
  app.run(main)
