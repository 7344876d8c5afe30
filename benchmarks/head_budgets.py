r"""Calibrated head budgets of a pretrained model against baselines with the same bytes.

  dga calibrate --workdir=runs/smollm2 --documents=some.jsonl --length=8192 \
    --keys=0.15,0.25,0.35 --output=runs/budgets.json
  ./workspace bench head_budgets --workdir=runs/smollm2 --documents=others.jsonl \
    --budgets=runs/budgets-0.15.json,runs/budgets-0.25.json,runs/budgets-0.35.json --out=runs/heads

Every set of budgets has four baselines with at most its keys:

  same full heads       its full heads; sinks and a window in all others (DuoAttention's form)
  sinks and window      the best of DuoAttention's forms among the starts of the calibration
  one window            sinks and a window in all heads
  one DGA setting       the smallest DGA setting of the budgets, or blocks of 30 + 2, with a raw
                        window in all heads

At a length that the budgets were not calibrated for, --scale_windows multiplies every window by the
ratio of the lengths, so that the share of the keys stays. A file that names no length, such as one
of the package, is taken for one of the longest length. Retrieval and RULER are measured with the
budgets as they are. An answer of retrieval is found if each of its tokens is the most likely one
after the earlier ones. RULER's answers are decoded greedily; its score is the share of the answers
found.

Perplexity is that of the second half of rows of the documents, over dense attention's, and with
--last=512 that of their last 512 tokens, which baselines that differ in decoding are measured on.
Intervals are 95 % of bootstrap samples: of documents for perplexity, of prompts of each task and
length for the others. Each result is appended to OUT/results.jsonl when it is measured, and the
same command continues an interrupted run. An OUT has the results of one model in one dtype.
OUT/table.md is the table of all results.

For perplexity and retrieval all sets run in one program whose argument is the assignment of
settings to heads: there is one program for each length, and no set compiles another. RULER has a
program for each set, since its answers are decoded with the set's cache; the programs of all sets
compile at the same time.
"""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks._budget_baselines import as_baseline, BASELINES, interval, make_baselines, Set
from benchmarks._budget_costs import costs_table
from benchmarks._budget_ruler import BudgetRuler
from benchmarks.timing import environment
from dga_jax.calibration.fingerprint import describe_model
from dga_jax.calibration.measuring import Measurer, open_results
from dga_jax.calibration.program import AssignedDecoder
from dga_jax.calibration.rows import Rows
from dga_jax.calibration.run import make_budgets
from dga_jax.checkpoint import load_model, load_model_config
from dga_jax.evaluation.report import markdown
from dga_jax.evaluation.results import Results
from dga_jax.evaluation.retrieval import TASKS
from dga_jax.evaluation.ruler import RULER_TASKS, RulerTexts
from dga_jax.evaluation.texts import Document, read_documents
from dga_jax.files.path_flags import define_path
from dga_jax.files.whole_file import whole_file
from dga_jax.head_budgets import FULL, read_calibrated
from dga_jax.model import Decoder, ModelConfig
from dga_jax.tokenizer import Tokenizer

_WORKDIR = define_path("workdir", None, "Checkpoint of the model.", required=True)
_DOCUMENTS = flags.DEFINE_list("documents", None, "Long texts: .jsonl or .txt.", required=True)
_MAX_DOCUMENTS = flags.DEFINE_integer("max_documents", 12, "Documents to use.", lower_bound=1)
_ROWS = flags.DEFINE_integer(
  "rows_per_document", 1, "Largest number of rows of text from one document.", lower_bound=1
)
_BUDGETS = flags.DEFINE_list("budgets", None, "Files of dga calibrate.", required=True)
_BASELINES = flags.DEFINE_list("baselines", list(BASELINES), "Baselines to measure; see above.")
_OUT = define_path("out", None, "Folder for results.", required=True)
_LENGTHS = flags.DEFINE_list("lengths", ["8192"], "Lengths of texts.")
_LAST = flags.DEFINE_integer(
  "last", 0, "Last tokens of the rows whose perplexity is measured by itself; 0 for none.", 0
)
_PROMPTS = flags.DEFINE_list("prompts", ["8192", "4096", "2048", "1024"], "Lengths of prompts.")
_TASKS = flags.DEFINE_list("tasks", list(TASKS), "Retrieval tasks.")
_SAMPLES = flags.DEFINE_integer("samples", 20, "Prompts of a task and length.", lower_bound=1)
_RULER = flags.DEFINE_list("ruler", [], "Lengths of RULER's prompts with their answers.")
_RULER_TASKS = flags.DEFINE_list("ruler_tasks", list(RULER_TASKS), "RULER's tasks.")
_RULER_SAMPLES = flags.DEFINE_integer(
  "ruler_samples", 10, "Prompts of a task of RULER and length.", lower_bound=1
)
_COSTS = flags.DEFINE_bool(
  "costs", False, "Table of bytes, operations and time of attention over texts of --lengths."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the prompts and of the bootstrap.")
_SCALE = flags.DEFINE_bool("scale_windows", True, "Scale windows with the length of texts.")
_ROPE_BASE = flags.DEFINE_float("rope_base", None, "RoPE base; default: the checkpoint's.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Dtype to compute in.")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 32768, "Tokens of one batch.")

for _flag, _names in ((_BASELINES, BASELINES), (_TASKS, TASKS), (_RULER_TASKS, RULER_TASKS)):
  flags.register_validator(
    _flag,
    lambda chosen, names=tuple(_names): set(chosen) <= set(names),
    message=f"{_flag.name} are names of {', '.join(_names)}, with commas between them.",
  )
for _flag in (_LENGTHS, _PROMPTS, _RULER):
  flags.register_validator(
    _flag,
    lambda chosen: all(map(str.isdecimal, chosen)),
    message=f"{_flag.name} takes numbers, with commas between them.",
  )


def main(argv: Sequence[str]) -> None:
  """Measures what is missing in OUT and writes the table."""
  del argv
  if not (_LENGTHS.value or _PROMPTS.value or _RULER.value):
    raise app.UsageError("--lengths, --prompts and --ruler are empty; give at least one length.")
  out = Path(_OUT.value)
  config = load_model_config(_WORKDIR.value)
  changes: dict[str, Any] = {"dtype": _DTYPE.value, "attention": "dense", "head_budgets": None}
  if _ROPE_BASE.value:
    changes["rope_base"] = _ROPE_BASE.value
  config = ModelConfig.from_dict(config.to_dict() | changes)
  model, config, tokenizer = load_model(_WORKDIR.value, config=config)
  documents = read_documents(_DOCUMENTS.value)[: _MAX_DOCUMENTS.value]
  sets = list(_read_sets(config))
  lengths, prompts, ruler = (list(map(int, flag.value)) for flag in (_LENGTHS, _PROMPTS, _RULER))
  results = open_results(out / "results.jsonl", describe_model(model), "--out")
  measure = _Measure(model, results, sets)
  counts = [(length, len(_text_rows(documents, tokenizer, length, None))) for length in lengths]
  counts += [(length, _SAMPLES.value) for length in prompts]
  measure.compile(counts)
  lines = [f"{environment()}, {config.dtype}, {len(documents)} documents"]
  for length in lengths:
    own = [one.scaled_to(length) for one in sets] if _SCALE.value else sets
    for last in [None, _LAST.value] if _LAST.value else [None]:
      lines += ["", _text_title(length, last), ""]
      lines += [_text_table(measure, own, documents, tokenizer, length, last)]
    if _COSTS.value:
      lines += ["", f"Costs of {length} tokens", "", costs_table(own, config, length)]
    print("\n".join(lines[-4:]), flush=True)
  found: dict[tuple[str, int], list[np.ndarray]] = {}
  for length, task in itertools.product(prompts, _TASKS.value):
    rows = Rows.from_puzzles(
      documents, tokenizer, length, puzzles=[task], samples=_SAMPLES.value, seed=_SEED.value
    )
    measured = measure(f"{task} {length}", rows, length, sets)
    found[task, length] = [np.array(one["found"], float)[:, 0] for one in measured]
  if found:
    lines += ["", "Answers found, %", "", _retrieval_table(sets, found)]
  scores: dict[tuple[str, int], list[np.ndarray]] = {}
  texts = RulerTexts([one.text for one in documents], tokenizer) if ruler else None
  for length in ruler:
    assert texts is not None
    parts = [
      texts.part(task, length, _RULER_SAMPLES.value, _SEED.value) for task in _RULER_TASKS.value
    ]
    scores |= _ruler_scores(BudgetRuler(model, tokenizer, parts, results), sets, length)
  if scores:
    lines += ["", "RULER, % of the answers found", "", _retrieval_table(sets, scores)]
  table = "\n".join(lines)
  with whole_file(out / "table.md") as partial:
    partial.write_text(table + "\n", encoding="utf-8")
  print(table)


def _read_sets(config: ModelConfig) -> Iterator[Set]:
  """Dense attention, and the budgets and baselines of every file."""
  shape = (config.num_layers, config.num_kv_heads)
  longest = max(map(int, [*_LENGTHS.value, *_PROMPTS.value, *_RULER.value]))
  yield Set("", "dense", make_budgets((FULL,), np.zeros(shape, int)), 1)
  for path in _BUDGETS.value:
    file, (budgets, found) = Path(path).stem, read_calibrated(path)
    stored = found or {"length": longest, "starts": []}
    length = stored["length"]
    yield Set(file, "budgets", budgets, length)
    for kind, one in make_baselines(budgets, stored, config):
      if one is not None and kind in _BASELINES.value:
        yield Set(file, kind, one, length)


class _Measure:
  """Measures sets on rows."""

  def __init__(self, model: Decoder, results: Results, sets: Sequence[Set]) -> None:
    self._model, self._results = model, results
    self._settings = list(dict.fromkeys(x for one in sets for x in one.budgets.settings))

  def compile(self, counts: Sequence[tuple[int, int]]) -> None:
    """Compiles the program of each shape at the same time; from lengths and numbers of rows."""
    begin = time.perf_counter()
    shapes = {(_batch_size(length, count), length) for length, count in counts}
    if not shapes:
      return
    AssignedDecoder(self._model, self._settings).compile(shapes)
    print(f"{len(shapes)} programs compiled in {time.perf_counter() - begin:.0f} s", flush=True)

  def __call__(
    self, name: str, rows: Rows, length: int, sets: Sequence[Set]
  ) -> list[dict[str, Any]]:
    settings = dict.fromkeys(setting for one in sets for setting in one.budgets.settings)
    begin, size = time.perf_counter(), _batch_size(length, len(rows))
    measurer = Measurer(self._model, list(settings), self._results, size, later=self._settings)
    measured = [measurer.measure_rows(name, rows, *as_baseline(one.budgets)) for one in sets]
    print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    return measured


def _ruler_scores(
  ruler: BudgetRuler, sets: Sequence[Set], length: int
) -> dict[tuple[str, int], list[np.ndarray]]:
  """For each task, named with the length, the scores of its prompts under every set."""
  ruler.compile([one.budgets for one in sets])
  scores = []
  for one in sets:
    begin = time.perf_counter()
    scores.append(ruler.scores(one.budgets))
    mean = np.mean(np.concatenate(scores[-1]))
    took = f"{time.perf_counter() - begin:.0f} s"
    print(f"ruler {length} {one.file} {one.kind}: {mean:.3f}, {took}", flush=True)
  by_task = zip(_RULER_TASKS.value, zip(*scores, strict=True), strict=True)
  return {(task, length): list(values) for task, values in by_task}


def _batch_size(length: int, rows: int) -> int:
  return min(rows, max(1, _BATCH_TOKENS.value // length))


def _text_rows(
  documents: Sequence[Document], tokenizer: Tokenizer, length: int, last: int | None
) -> Rows:
  return Rows.from_texts(documents, tokenizer, length, _ROWS.value, last)


def _text_title(length: int, last: int | None) -> str:
  return f"Perplexity of the last {last or length - length // 2} of {length} tokens"


def _text_table(
  measure: _Measure,
  sets: Sequence[Set],
  documents: Sequence[Document],
  tokenizer: Tokenizer,
  length: int,
  last: int | None,
) -> str:
  per_document = [len(_text_rows([one], tokenizer, length, last)) for one in documents]
  rows = _text_rows(documents, tokenizer, length, last)
  losses = measure(f"text {length}" + (f" last {last}" if last else ""), rows, length, sets)
  dense = np.array(losses[0]["loss"])
  body = []
  for one, measured in zip(sets, losses, strict=True):
    rise = np.array(measured["loss"]) - dense
    by_document = [part.mean() for part in np.split(rise, np.cumsum(per_document)[:-1])]
    low, high = np.exp(interval([np.array(by_document)], _SEED.value))
    ratio = f"{math.exp(rise.mean()):.4f} ({low:.4f} to {high:.4f})"
    if one.kind == "dense":
      ratio = f"1 ({math.exp(dense.mean()):.3f})"
    divergence = f"{np.mean(measured['divergence']):.4f}"
    body.append([one.file, one.kind, f"{one.share(length):.4f}", ratio, divergence])
  return markdown(["file", "set", "share", "perplexity over dense", "divergence"], body)


def _retrieval_table(sets: Sequence[Set], found: dict[tuple[str, int], list[np.ndarray]]) -> str:
  lengths = sorted({length for _, length in found})
  tasks = list(dict.fromkeys(task for task, _ in found))
  body = []
  for index, one in enumerate(sets):
    cells = {key: values[index] for key, values in found.items()}
    change = [values[index] - values[0] for values in found.values()]
    low, high = 100 * interval(change, _SEED.value)
    points = 100 * np.mean([cell.mean() for cell in change])
    by_length = [np.mean([cells[task, length].mean() for task in tasks]) for length in lengths]
    by_task = [np.mean([cells[task, length].mean() for length in lengths]) for task in tasks]
    body.append([
      one.file, one.kind, f"{100 * np.mean([cell.mean() for cell in cells.values()]):.1f}",
      f"{points:+.1f} ({low:+.1f} to {high:+.1f})",
      *(f"{100 * share:.0f}" for share in (*by_length, *by_task)),
    ])  # fmt: skip
  header = ["file", "set", "mean", "points against dense", *map(str, lengths), *tasks]
  return markdown(header, body)


if __name__ == "__main__":
  app.run(main)
