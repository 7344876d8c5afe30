"""Chooses the setting of each KV head of a model: its share of the cache goes where it matters.

  dga calibrate --workdir=runs/smollm2 --documents=dev.jsonl --keys=0.25 --length=8192 \
    --output=budgets.json

The candidates of a head are "full", streaming selection, and sinks with a sliding window. Each KV
head alone is given each candidate while all other heads stay dense. Two losses are measured: of the
second half of long texts, and of answers in retrieval prompts made by code. A MILP solver (HiGHS,
in SciPy) allocates the candidates under the budget. The result is the best of this set, of full
heads with sinks and a window in all others (DuoAttention's form), and of one setting in all heads,
after measured changes: each head is measured again beside this set, and swaps of heads are kept if
they measure better.

Measurements are appended to OUTPUT's sibling with the suffix .measured.jsonl; the same command
continues after an interruption, and other --keys, --objective, --blocks or --windows use the same
measurements.
OUTPUT holds the budgets, and a table of losses over the share of the cost; the plot has OUTPUT's
name and the suffix .png. Needs the extra "calibrate" (matplotlib and scipy).

One measurement of a head takes half of a forward pass: a head of a layer needs only this layer and
later ones. All heads are measured under the smallest candidate, and the heads outside --tail under
the others. At most KV heads x candidates x rows / 2 forward passes; --refine adds as many as the
settings of the best set need.
"""

import re
from pathlib import Path
from typing import Any, cast

from absl import app, flags

from dga_jax import command_line
from dga_jax.evaluation.retrieval import TASKS
from dga_jax.files.path_flags import define_path, define_paths

_WORKDIR = define_path("workdir", None, "Folder with the checkpoint.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_DOCUMENTS = define_paths(
  "documents", "Files: .jsonl with id and text (also .xz, .gz, .bz2), or .txt."
)
_CHECK_DOCUMENTS = define_paths(
  "check_documents", "Held-out files for the table; default: the calibration rows."
)
_MAX_DOCUMENTS = flags.DEFINE_integer(
  "max_documents", 4, "Documents used of --documents and of --check_documents.", lower_bound=1
)
_ROWS = flags.DEFINE_integer(
  "rows_per_document", 1, "Largest number of rows of text from one document.", lower_bound=1
)
_OUTPUT = define_path("output", None, "JSON file of the budgets.", required=True)
_KEYS = flags.DEFINE_float(
  "keys", 0.25, "Bound on the objective, as a share of dense attention's.", 0.0, 1.0
)
_OBJECTIVE = flags.DEFINE_enum(
  "objective", "bytes", ["bytes", "flops", "latency"],
  "What --keys bounds: bytes of the cache, operations of attention, or its measured time.",
)  # fmt: skip
_LENGTH = flags.DEFINE_integer("length", 8192, "Tokens of a row.", lower_bound=16)
_BLOCKS = flags.DEFINE_list(
  "blocks", ["30+2", "62+2"], "Candidates: blocks of m merged and f focal tokens, as m+f."
)
_WINDOWS = flags.DEFINE_list(
  "windows",
  ["128", "1024"],
  "Candidates: raw tokens before the block, rounded to whole blocks. Each block and window has a "
  "sliding window of equal bytes beside it.",
)
_SINKS = flags.DEFINE_integer("sinks", 4, "Candidates: first tokens that stay.", lower_bound=0)
_PUZZLES = flags.DEFINE_list("puzzles", ["passkey"], f"Retrieval tasks: {', '.join(TASKS)}.")
_SAMPLES = flags.DEFINE_integer("samples", 4, "Prompts of each retrieval task.", lower_bound=1)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of the retrieval prompts; those of --check_documents use the next seed."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Rows that run together.", lower_bound=1)
_TAIL = flags.DEFINE_float(
  "tail", 0.05, "Heads that carry at most this share of the losses' rise are measured under the "
  "smallest candidate alone, and estimated under the others. 0 measures all.", 0.0, 1.0
)  # fmt: skip
_ROUNDS = flags.DEFINE_integer("rounds", 16, "Largest number of measured swaps.", lower_bound=0)
_REFINE = flags.DEFINE_bool(
  "refine", True, "Measure each head again beside the best of the first sets."
)
_SHARES = flags.DEFINE_list(
  "shares", [f"{tenth / 10:g}" for tenth in range(1, 11)], "Shares of the table."
)


def main() -> None:
  """Calibrates, prints the table, and writes the budgets and the plot."""
  blocks, windows, shares = _read_flags()
  output = Path(_OUTPUT.value)

  from dga_jax.calibration import plot, report
  from dga_jax.calibration.candidates import make_grid, Objective
  from dga_jax.calibration.fingerprint import describe_model
  from dga_jax.calibration.measuring import Measurer, open_results
  from dga_jax.calibration.run import calibrate, Goal
  from dga_jax.checkpoint import load_model
  from dga_jax.evaluation.results import environment

  objective = cast(Objective, _OBJECTIVE.value)
  goal = Goal(
    _KEYS.value, objective, _LENGTH.value, _TAIL.value, _ROUNDS.value, _REFINE.value, shares
  )
  model, config, tokenizer = load_model(_WORKDIR.value, _STEP.value)
  candidates = make_grid(
    blocks, windows, _SINKS.value, _LENGTH.value, has_selector=config.focal_selector
  )
  rows = _make_rows(_DOCUMENTS.value, tokenizer, _SEED.value)
  check_rows = rows
  if _CHECK_DOCUMENTS.value:
    check_rows = _make_rows(_CHECK_DOCUMENTS.value, tokenizer, _SEED.value + 1)
  measured_with = {
    "model": describe_model(model),
    "length": _LENGTH.value,
    "text_rows": rows.text.digest,
    "retrieval_rows": rows.retrieval.digest,
    "puzzles": _PUZZLES.value,
    "samples": _SAMPLES.value,
    "seed": _SEED.value,
    "batch_size": _BATCH_SIZE.value,
  }
  results = open_results(output.with_suffix(".measured.jsonl"), measured_with)
  measurer = Measurer(model, candidates, results, _BATCH_SIZE.value)
  result = calibrate(measurer, model.config, goal, rows, check_rows)
  name = "/".join(Path(_WORKDIR.value).absolute().parts[-2:])
  provenance = measured_with | {
    "name": name,
    "share": _KEYS.value,
    "objective": _OBJECTIVE.value,
    "check_rows": "calibration rows" if check_rows is rows else check_rows.text.digest,
    "environment": environment(),
  }
  report.write_json(result, provenance, output)
  share = f"{result.share:.3f} of dense {_OBJECTIVE.value}"
  title = f"Settings of the KV heads · {name} · {_LENGTH.value} tokens · {share}"
  plot.plot_budgets(result, _LENGTH.value, title, output.with_suffix(".png"))
  print(report.table(result))
  print(f"\n{output}\n{output.with_suffix('.png')}")


def _read_flags() -> tuple[list[tuple[int, int]], list[int], tuple[float, ...]]:
  """Blocks, windows and shares; raises UsageError or ValueError before any heavy import."""
  if not _DOCUMENTS.value:
    raise app.UsageError("dga calibrate needs --documents.")
  if _KEYS.value == 0:
    raise ValueError("--keys is 0; it must be above 0, at most 1.")
  if unknown := [name for name in _PUZZLES.value if name not in TASKS]:
    raise ValueError(f"--puzzles has {unknown[0]!r}; the puzzles are {', '.join(TASKS)}.")
  blocks = []
  for text in _BLOCKS.value:
    match = re.fullmatch(r"([1-9]\d*)\+([1-9]\d*)", text)
    if not match:
      raise ValueError(f"--blocks has {text!r}; write m+f, such as 30+2.")
    blocks.append((int(match[1]), int(match[2])))
  try:
    windows, shares = [int(one) for one in _WINDOWS.value], [float(one) for one in _SHARES.value]
  except ValueError as error:
    raise ValueError(f"--windows or --shares is not numbers with commas: {error}") from error
  if any(window < 0 for window in windows):
    raise ValueError(f"--windows is {','.join(_WINDOWS.value)}; the numbers must be at least 0.")
  if not all(0 < share <= 1 for share in shares):
    raise ValueError(f"--shares is {','.join(_SHARES.value)}; each must be above 0, at most 1.")
  return blocks, windows, tuple(shares)


def _make_rows(paths: list[str], tokenizer: Any, seed: int) -> Any:
  from dga_jax.calibration.measuring import RowSet
  from dga_jax.calibration.rows import Rows
  from dga_jax.evaluation.texts import read_documents

  documents = read_documents(paths)[: _MAX_DOCUMENTS.value]
  return RowSet(
    text=Rows.from_texts(documents, tokenizer, _LENGTH.value, _ROWS.value),
    retrieval=Rows.from_puzzles(
      documents,
      tokenizer,
      _LENGTH.value,
      puzzles=_PUZZLES.value,
      samples=_SAMPLES.value,
      seed=seed,
    ),
  )


if __name__ == "__main__":
  command_line.run(main)
