r"""Chooses a setting of attention for each KV head of a model.

  dga calibrate --workdir=runs/smollm2 --documents=dev.jsonl \
    --keys=0.25 --length=8192

The settings of all heads together keep the share --keys of the bytes of a dense
cache. The candidates of a head are dense attention ("full"), DGA with streaming
selection, and attention sinks with a sliding window.

1. Each KV head alone is given each candidate while all other heads stay dense.
   Two divergences from dense attention are measured: of the predictions in the
   second half of long texts, and of the answers to questions about facts that
   are hidden in the texts.
2. A MILP solver (HiGHS, in SciPy) allocates the candidates to heads. Further
   sets: full heads with windows in all others (DuoAttention's form), one
   setting in all heads, and the sets of --starts.
3. The --improved best sets are changed, and a change that lowers the measured
   divergence is kept. The result is the best set.

OUTPUT holds the budgets for `dga generate --budgets` and a table of losses; a
plot has the same name with the suffix .png. Measurements are appended to a file
beside OUTPUT with the suffix .measured.jsonl. The same command continues after
an interruption, and other --keys, --objective, --blocks or --windows use the
same measurements.

Time: a measurement of a head takes half a forward pass on average. Step 1 takes
at most KV heads x candidates x rows of them, and a refinement in step 3 KV
heads x (settings of the set - 1) x rows. The command needs the extra
"calibrate" (matplotlib and scipy).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, NamedTuple

from absl import app, flags

from dga_jax import command_line
from dga_jax.choices import DtypeName
from dga_jax.evaluation.retrieval import TASKS
from dga_jax.files.path_flags import define_path, define_paths
from dga_jax.flag_help import FlagGroups

_GROUPS = FlagGroups()

_GROUPS.start("Model and documents")
_WORKDIR = define_path("workdir", None, "Folder with the checkpoint.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_DTYPE = flags.DEFINE_enum(
  "dtype", None, get_args(DtypeName), "Dtype to compute in; default: the checkpoint's."
)
_ROPE_BASE = flags.DEFINE_float("rope_base", None, "RoPE base; default: the checkpoint's.")
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
_LENGTH = flags.DEFINE_integer(
  "length", 8192, "Tokens of a row: the context at which the model will be used.", lower_bound=16
)

_GROUPS.start("Budget")
_KEYS = flags.DEFINE_list(
  "keys", ["0.25"], "Shares of dense attention's cost to keep; one set of budgets for each."
)
_OBJECTIVE = flags.DEFINE_enum(
  "objective", "bytes", ["bytes", "flops", "latency"],
  "What --keys bounds: bytes of the cache, operations of attention, or its measured time.",
)  # fmt: skip
_OUTPUT = define_path(
  "output", None, "JSON file of the budgets; default: WORKDIR/budgets-SHARE.json, among which the "
  "--keys of dga generate choose."
)  # fmt: skip
_SHARES = flags.DEFINE_list(
  "shares",
  [f"{tenth / 10:g}" for tenth in range(1, 11)],
  "Shares of the cost in the printed table.",
)

_GROUPS.start("Candidates")
_BLOCKS = flags.DEFINE_list(
  "blocks", ["30+2", "62+2"], "Candidates: blocks of m merged and f focal tokens, as m+f."
)
_WINDOWS = flags.DEFINE_list(
  "windows",
  ["128", "1024"],
  "Candidates: raw tokens before the block, rounded to whole blocks. Each block and window has a "
  "sliding window of equal bytes beside it.",
)
_SLIDING_WINDOWS = flags.DEFINE_list(
  "sliding_windows", ["32", "256"], "Candidates: further sliding windows, in tokens."
)
_SINKS = flags.DEFINE_integer("sinks", 4, "Candidates: first tokens that stay.", lower_bound=0)
_LAYER_KINDS = flags.DEFINE_integer(
  "layer_kinds", 8, "Largest number of kinds of layers. Layers of a kind have the same settings in "
  "their heads, in any order. The compiled model has a branch for each kind.", lower_bound=1
)  # fmt: skip

_GROUPS.start("Measurement")
_PUZZLES = flags.DEFINE_list(
  "puzzles", list(TASKS), "Retrieval tasks; each row of retrieval has a question of each."
)
_SAMPLES = flags.DEFINE_integer("samples", 4, "Rows of retrieval prompts.", lower_bound=1)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of the retrieval prompts; those of --check_documents use the next seed."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Rows that run together.", lower_bound=1)
_MEASURE = flags.DEFINE_enum(
  "measure", "divergence", ["divergence", "loss"],
  "Damage of a set: its divergence from dense attention, or the rise of the loss of the right "
  "tokens. Beyond the trained length a set may predict better than dense attention, which only the "
  "loss shows.",
)  # fmt: skip
_TAIL = flags.DEFINE_float(
  "tail", 0.05, "Heads that carry at most this share of the divergences are measured under the "
  "smallest candidate alone, and estimated under the others. 0 measures all.", 0.0, 1.0
)  # fmt: skip

_GROUPS.start("Search")
_STARTS = define_paths(
  "starts", "Files of budgets for the same model, as further sets to start from. Their windows "
  "are scaled to --length from the length that a file names. A file starts the shares that it "
  "does not exceed."
)  # fmt: skip
_IMPROVED = flags.DEFINE_integer(
  "improved", 2, "Sets to improve by measured changes.", lower_bound=1
)
_REFINEMENTS = flags.DEFINE_integer(
  "refinements",
  2,
  "Largest number of passes that measure the heads again beside the best set.",
  lower_bound=0,
)
_ROUNDS = flags.DEFINE_integer(
  "rounds", 16, "Largest number of measured swaps of a set.", lower_bound=0
)
# The flags that decide the budgets beside those of the measurements.
_DECIDING: tuple[flags.FlagHolder[Any], ...] = (
  _OBJECTIVE, _BLOCKS, _WINDOWS, _SLIDING_WINDOWS, _SINKS, _TAIL, _LAYER_KINDS, _STARTS, _IMPROVED,
  _ROPE_BASE, _ROUNDS, _REFINEMENTS, _SHARES,
)  # fmt: skip


def main() -> None:
  """Calibrates, prints the table, and writes the budgets and the plot of each share."""
  options = _read_flags()

  from dga_jax.calibration.candidates import make_grid
  from dga_jax.calibration.fingerprint import describe_model
  from dga_jax.calibration.measuring import Measurer, open_results
  from dga_jax.calibration.starts import read_starts
  from dga_jax.checkpoint import load_model, load_model_config
  from dga_jax.checkpoint_files import existing_step
  from dga_jax.model import ModelConfig

  step = existing_step(_WORKDIR.value, _STEP.value)
  config = load_model_config(_WORKDIR.value, step)
  changes = {"dtype": _DTYPE.value, "rope_base": _ROPE_BASE.value}
  given = {name: value for name, value in changes.items() if value is not None}
  config = ModelConfig.from_dict(config.to_dict() | given)
  model, config, tokenizer = load_model(_WORKDIR.value, step, config=config)
  candidates = make_grid(
    options.blocks,
    options.windows,
    _SINKS.value,
    _LENGTH.value,
    sliding_windows=options.sliding_windows,
    has_selector=config.focal_selector,
  )
  rows = _make_rows(_DOCUMENTS.value, tokenizer, _SEED.value)
  known = read_starts(map(Path, _STARTS.value or ()), config, _LENGTH.value)
  check_rows = rows
  if _CHECK_DOCUMENTS.value:
    check_rows = _make_rows(_CHECK_DOCUMENTS.value, tokenizer, _SEED.value + 1)
  measured_with = {
    "model": describe_model(model),
    "dtype": config.dtype,
    "length": _LENGTH.value,
    "text_rows": rows.text.digest,
    "retrieval_rows": rows.retrieval.digest,
    "puzzles": _PUZZLES.value,
    "samples": _SAMPLES.value,
    "seed": _SEED.value,
    "batch_size": _BATCH_SIZE.value,
  }
  results = open_results(_output().with_suffix(".measured.jsonl"), measured_with)
  check_digest = "calibration rows" if check_rows is rows else check_rows.text.digest
  measure: Any = _MEASURE.value
  deciding = {flag.name: flag.value for flag in _DECIDING}
  provenance = measured_with | {"check_rows": check_digest, "measure": measure, "flags": deciding}
  if _OUTPUT.value is None:
    for share in options.keys:
      _refuse_other(_output_of(share), provenance)
  later = [setting for one in known for setting in one.set.candidates]
  for share in options.keys:
    measurer = Measurer(model, candidates, results, _BATCH_SIZE.value, measure, later)
    _calibrate(measurer, config, share, options.shares, (rows, check_rows), known, provenance)


def _calibrate(
  measurer: Any,
  config: Any,
  share: float,
  table_shares: tuple[float, ...],
  rows: tuple[Any, Any],
  known: Any,
  measured_with: dict[str, Any],
) -> None:
  """Calibrates for one share and writes its files."""
  from dga_jax.calibration import plot, report
  from dga_jax.calibration.goal import Goal
  from dga_jax.calibration.run import calibrate
  from dga_jax.evaluation.results import environment

  objective: Any = _OBJECTIVE.value
  output = _output_of(share)
  goal = Goal(
    share=share,
    objective=objective,
    length=_LENGTH.value,
    tail=_TAIL.value,
    rows=_LAYER_KINDS.value,
    improved=_IMPROVED.value,
    rounds=_ROUNDS.value,
    refinements=_REFINEMENTS.value,
    table_shares=table_shares,
  )
  result = calibrate(measurer, config, goal, *rows, known)
  name = "/".join(Path(_WORKDIR.value).absolute().parts[-2:])
  provenance = measured_with | {
    "name": name,
    "share": share,
    "objective": objective,
    "environment": environment(),
  }
  report.write_json(result, provenance, output)
  cost = f"{result.share:.3f} of dense {objective}"
  title = f"Settings of the KV heads · {name} · {_LENGTH.value} tokens · {cost}"
  plot.plot_budgets(result, _LENGTH.value, title, output.with_suffix(".png"))
  print(report.table(result))
  print(f"\n{output}\n{output.with_suffix('.png')}", flush=True)


def _output() -> Path:
  """The file of budgets; the names of files for several shares begin with its stem."""
  return Path(_OUTPUT.value or Path(_WORKDIR.value) / "budgets.json")


def _output_of(share: float) -> Path:
  """The file of the budgets of a share."""
  output = _output()
  if len(_KEYS.value) > 1 or _OUTPUT.value is None:
    output = output.with_stem(f"{output.stem}-{share:g}")
  return output


def _refuse_other(path: Path, provenance: dict[str, Any]) -> None:
  """Raises FileExistsError where a file without a given name has budgets of another calibration."""
  if not path.exists():
    return
  from dga_jax.head_budgets import read_calibrated

  stored = read_calibrated(path)[1]
  wanted = json.loads(json.dumps(provenance))
  if other := [name for name in wanted if stored.get(name) != wanted[name]]:
    raise FileExistsError(
      f"{path} exists and was made with other values of {', '.join(other)}. Give --output=FILE, or "
      "move the file away."
    )


class _Options(NamedTuple):
  """Flags that are lists."""

  keys: tuple[float, ...]
  blocks: list[tuple[int, int]]
  windows: list[int]
  sliding_windows: list[int]
  shares: tuple[float, ...]


def _read_flags() -> _Options:
  """Raises UsageError or ValueError before any heavy import."""
  if not _DOCUMENTS.value:
    raise app.UsageError("dga calibrate needs --documents.")
  if unknown := [name for name in _PUZZLES.value if name not in TASKS]:
    raise ValueError(f"--puzzles has {unknown[0]!r}; the puzzles are {', '.join(TASKS)}.")
  if len(set(_PUZZLES.value)) < len(_PUZZLES.value) or not _PUZZLES.value:
    raise ValueError(f"--puzzles is {','.join(_PUZZLES.value)!r}; give at least one, each once.")
  blocks = []
  for text in _BLOCKS.value:
    match = re.fullmatch(r"([1-9]\d*)\+([1-9]\d*)", text)
    if not match:
      raise ValueError(f"--blocks has {text!r}; write m+f, such as 30+2.")
    blocks.append((int(match[1]), int(match[2])))
  return _Options(
    keys=_shares(_KEYS),
    blocks=blocks,
    windows=_counts(_WINDOWS, least=0),
    sliding_windows=_counts(_SLIDING_WINDOWS, least=1),
    shares=_shares(_SHARES),
  )


def _counts(flag: flags.FlagHolder, least: int) -> list[int]:
  values = _numbers(flag, int)
  if any(value < least for value in values):
    raise ValueError(
      f"--{flag.name} is {','.join(flag.value)}; the numbers must be at least {least}."
    )
  return values


def _shares(flag: flags.FlagHolder) -> tuple[float, ...]:
  values = _numbers(flag, float)
  if not all(0 < value <= 1 for value in values):
    raise ValueError(f"--{flag.name} is {','.join(flag.value)}; each must be above 0, at most 1.")
  return tuple(values)


def _numbers(flag: flags.FlagHolder, kind: Callable[[str], Any]) -> list[Any]:
  try:
    return [kind(one) for one in flag.value]
  except ValueError as error:
    raise ValueError(f"--{flag.name} is not numbers with commas: {error}") from error


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
  command_line.run(main, _GROUPS)
