"""Quality of a pretrained model under every attention kind, without training.

  python -m dga_jax.convert --source=SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/smollm2
  ./workspace bench quality --workdir=runs/smollm2 --documents=novels.jsonl --out=runs/quality

Perplexity by position at 2K, 4K and 8K tokens, passkeys at 1K to 8K, both at 12K and 16K with the
base of RoPE raised to 4e5, and DGA with one part swapped, for all layers and for each alone.
Decoding is measured token by token where it is not the same function as over whole sequences.

Every cell is added to OUT/quality.jsonl as soon as it is there; the same command goes on where it
stopped, and --minutes bounds a run. Most of the time goes into compiling: --workers=4 does it for
several cells at once, as far as the device's memory holds them. --cells is a regular expression on
the cells' names, which --list prints. Pictures and tables in OUT are drawn from all cells that the
file holds.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags, logging

from benchmarks import _quality_variants as variants_of
from benchmarks.timing import environment
from dga_jax.checkpoint import list_steps, load_model
from dga_jax.config import RETROFIT
from dga_jax.evaluation import jobs, plots, report
from dga_jax.evaluation.perplexity import PerplexitySettings
from dga_jax.evaluation.results import Results
from dga_jax.evaluation.retrieval import Haystack
from dga_jax.evaluation.texts import read_documents, token_rows
from dga_jax.evaluation.variants import Family, Variant
from dga_jax.path_flags import define_path
from dga_jax.tokenizer import Tokenizer

_WORKDIR = define_path("workdir", None, "Checkpoint of the model.", required=True)
_DOCUMENTS = flags.DEFINE_list("documents", None, "Long texts: .jsonl or .txt.", required=True)
_OUT = define_path("out", None, "Folder for results.", required=True)
_CELLS = flags.DEFINE_string("cells", "", "Regular expression on cell names; default: all.")
_LIST = flags.DEFINE_bool("list", False, "Only print the names of the cells.")
_DRAW = flags.DEFINE_bool("draw", False, "Only draw what is there.")
_MINUTES = flags.DEFINE_float("minutes", None, "Begin no cell after that time.")
_WORKERS = flags.DEFINE_integer("workers", 1, "Cells under way at once.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "To compute in.")
_LENGTHS = flags.DEFINE_list("lengths", ["8192", "4096", "2048"], "Of perplexity.")
_PASSKEYS = flags.DEFINE_list("passkeys", ["8192", "4096", "2048", "1024"], "Of prompts.")
_LONG = flags.DEFINE_list("long", ["12288", "16384"], "Lengths with the base raised.")
_LONG_BASE = flags.DEFINE_float("long_base", 4e5, "Base of RoPE there.")
_MAX_DOCUMENTS = flags.DEFINE_integer("max_documents", 12, "Of them.", lower_bound=1)
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 32768, "Tokens that run together.")
_TARGETS = flags.DEFINE_integer("targets", 512, "Last tokens that are decoded one by one.")
_SAMPLES = flags.DEFINE_integer("samples", 8, "Passkeys at each of five depths.", lower_bound=1)

type _Variants = Callable[[int], Iterator[Variant]]

_DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)


def main(argv: Sequence[str]) -> None:
  """Measures what is missing, in the order of what matters most, then draws."""
  del argv
  logging.set_verbosity(logging.WARNING)
  out = Path(_OUT.value)
  records = Results(out / "quality.jsonl")
  if not _DRAW.value:
    model, _, tokenizer = load_model(_WORKDIR.value)
    family = Family(model, tokenizer.start_ids)
    wanted = re.compile(_CELLS.value)
    chosen = [cell for cell in make_jobs(family, tokenizer) if wanted.search(cell.key)]
    if _LIST.value:
      print(
        "\n".join(f"{'done ' if cell.key in records else '     '}{cell.key}" for cell in chosen)
      )
      return
    print(environment())
    origin = f"{_WORKDIR.value}, step {list_steps(_WORKDIR.value)[-1]}"
    missing = jobs.run_jobs(
      chosen, records, origin=origin, minutes=_MINUTES.value, workers=_WORKERS.value
    )
    print(f"{len(chosen) - missing} cells are there, {missing} are missing.")
  for path in draw(records, out):
    print(path)


def make_jobs(family: Family, tokenizer: Tokenizer) -> Iterator[jobs.Job]:
  """All cells; the first ones answer the main questions."""
  make = _Jobs(family, tokenizer)
  lengths, prompts, long = (
    [int(length) for length in flag.value] for flag in (_LENGTHS, _PASSKEYS, _LONG)
  )
  yield from make.perplexities(lengths, variants_of.core)
  yield from make.passkeys(prompts, variants_of.core)
  yield from make.ablations(lengths[:1])
  yield from make.perplexities(lengths, variants_of.shares)
  yield from make.passkeys(prompts, variants_of.shares)
  for some in (variants_of.grid, variants_of.switches, variants_of.papers):
    yield from make.perplexities(lengths, some)
    yield from make.passkeys(prompts, some)
  yield from make.perplexities(long, variants_of.long, _LONG_BASE.value)
  yield from make.passkeys(long, variants_of.long, _LONG_BASE.value)
  yield from make.ablations(lengths[1:])


class _Jobs:
  """Makes cells of one model and the documents of the flags."""

  def __init__(self, family: Family, tokenizer: Tokenizer) -> None:
    self._family, self._tokenizer = family, tokenizer
    self._documents = read_documents(_DOCUMENTS.value)[: _MAX_DOCUMENTS.value]
    self._hay = Haystack([document.text for document in self._documents], tokenizer)

  def perplexities(
    self, lengths: Sequence[int], some: _Variants, base: float | None = None
  ) -> Iterator[jobs.Job]:
    for length in lengths:
      settings = PerplexitySettings(
        batch_size=_batch(length), targets=_TARGETS.value, always_decode=False
      )
      for variant in some(length):
        yield jobs.perplexity_job(
          self._family, _finish(variant, base), self._rows(length), settings
        )

  def passkeys(
    self, lengths: Sequence[int], some: _Variants, base: float | None = None
  ) -> Iterator[jobs.Job]:
    for length in lengths:
      settings = jobs.RetrievalSettings(_DEPTHS, _SAMPLES.value, batch_size=_batch(length))
      for variant in some(length):
        yield jobs.retrieval_job(
          self._family, self._tokenizer, self._hay, _finish(variant, base), "passkey", length,
          settings,
        )  # fmt: skip

  def ablations(self, lengths: Sequence[int]) -> Iterator[jobs.Job]:
    for length in lengths:
      yield jobs.ablation_job(
        self._family, "DGA retrofit", RETROFIT, self._rows(length), _batch(length)
      )

  @functools.cache  # noqa: B019  # lives as long as the command
  def _rows(self, length: int) -> np.ndarray:
    """As much text at every length."""
    longest = max(map(int, _LENGTHS.value))
    return token_rows(self._documents, self._tokenizer, length, max(1, longest // length))


def draw(records: Results, out: Path) -> Iterator[Path]:
  """Tables of each task, and a picture of each question."""
  everything = records.all()
  lengths = {record["length"] for record in everything}
  main = {variant.name for length in lengths for variant in variants_of.core(length)}
  for task in ("perplexity", "retrieval"):
    yield from report.write(task, everything, out, plotted=main)
  for record in everything:
    if record["task"] == "ablation":
      yield from _draw_ablation(record, out)
  yield from _draw_passkeys_by_share(everything, out)


def _draw_ablation(record: dict, out: Path) -> Iterator[Path]:
  length, dense, swaps = record["length"], record["swaps"]["dense"], record["swaps"]
  own = swaps["as configured"]
  rows = [
    [name, f"{math.exp(loss):.3f}", f"{math.exp(loss - dense):.4f}", f"{loss - own:+.4f}"]
    for name, loss in swaps.items()
  ]
  header = ["part", "perplexity", "over dense", "loss against the config"]
  table = out / f"ablation_{length}.md"
  table.write_text(report.markdown(header, rows) + "\n", encoding="utf-8")
  yield table
  for title, level in (("one_layer_dga", dense), ("one_layer_dense", own)):
    path = out / f"ablation_{title}_{length}.png"
    change = [loss - level for loss in record[title]]
    label = "Loss against dense" if title == "one_layer_dga" else "Loss against DGA in every layer"
    name = title.replace("_", " ")
    plots.plot_by_layer(
      {name: change},
      path,
      y_label=f"{label} (nats per token)",
      title=report.title(f"Ablation: {name}", [record]),
      baselines={"no change": 0.0},
      standard_errors={name: record.get(f"{title}_errors")},
    )
    yield path
  raw = out / f"ablation_{length}.json"
  raw.write_text(json.dumps(record, indent=1), encoding="utf-8")
  yield raw


def _draw_passkeys_by_share(everything: list[dict], out: Path) -> Iterator[Path]:
  own = [record for record in everything if record["task"] == "retrieval"]
  for length in sorted({record["length"] for record in own}):
    path = out / f"passkey_by_share_{length}.png"
    at_length = [record for record in own if record["length"] == length]
    plots.plot_against_share(
      report.by_method(at_length, report.passkey_values),
      path,
      y_label="Passkeys found",
      title=report.title("Passkeys by share of keys", at_length),
      from_0_to_1=True,
    )
    yield path


def _finish(variant: Variant, base: float | None) -> Variant:
  overrides = {**variant.overrides, "dtype": _DTYPE.value}
  if base is not None:
    overrides["rope_base"] = base
  return Variant(variant.name, overrides, variant.keys)


def _batch(length: int) -> int:
  return max(1, _BATCH_TOKENS.value // length)


if __name__ == "__main__":
  app.run(main)
