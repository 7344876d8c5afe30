"""Quality of a pretrained model under each attention kind, without training.

  python -m dga_jax.convert --source=SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/smollm2
  ./workspace bench quality --workdir=runs/smollm2 --documents=novels.jsonl --out=runs/quality

The jobs measure perplexity by position at 2K, 4K and 8K tokens, passkey retrieval at 1K to 8K, and
both at 12K and 16K with the RoPE base raised to 4e5. Ablation jobs replace one part of DGA, in all
layers and in each layer alone. Where decoding is not the same function as prefill, the last tokens
are decoded one by one.

Each result is appended to OUT/quality.jsonl as soon as it is measured. The same command continues
an interrupted run; other weights than those of OUT/model.jsonl are refused. --minutes limits the
time of a run. Most of the time is compilation: --workers=4 compiles four jobs at once, and the
device memory that the jobs need adds up. --jobs is a regular expression on job names; --list prints
the names. The tables and plots in OUT contain all results of the file.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags, logging

from benchmarks import _quality_variants as variants
from benchmarks._results_model import require_model
from benchmarks.timing import environment
from dga_jax.checkpoint import list_steps, load_model
from dga_jax.config import RETROFIT
from dga_jax.evaluation import jobs, plots, report
from dga_jax.evaluation.perplexity import PerplexitySettings
from dga_jax.evaluation.results import Results
from dga_jax.evaluation.retrieval import Haystack
from dga_jax.evaluation.texts import read_documents, token_rows
from dga_jax.evaluation.variants import Family, Variant
from dga_jax.files.path_flags import define_path
from dga_jax.tokenizer import Tokenizer

_WORKDIR = define_path("workdir", None, "Checkpoint of the model.", required=True)
_DOCUMENTS = flags.DEFINE_list("documents", None, "Long texts: .jsonl or .txt.", required=True)
_OUT = define_path("out", None, "Folder for results.", required=True)
_JOBS = flags.DEFINE_string("jobs", "", "Run the jobs whose name matches this regular expression.")
_LIST = flags.DEFINE_bool("list", False, "Only print the names of the jobs.")
_REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Only write the tables and plots.")
_MINUTES = flags.DEFINE_float("minutes", None, "Start no job after this many minutes.")
_WORKERS = flags.DEFINE_integer("workers", 1, "Jobs that run at the same time.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Dtype of the computation."
)
_LENGTHS = flags.DEFINE_list("lengths", ["8192", "4096", "2048"], "Lengths of perplexity jobs.")
_PASSKEYS = flags.DEFINE_list(
  "passkeys", ["8192", "4096", "2048", "1024"], "Prompt lengths of passkey jobs."
)
_LONG = flags.DEFINE_list("long", ["12288", "16384"], "Lengths to run with the raised RoPE base.")
_LONG_BASE = flags.DEFINE_float("long_base", 4e5, "RoPE base at the lengths of --long.")
_MAX_DOCUMENTS = flags.DEFINE_integer(
  "max_documents", 12, "Number of documents to use.", lower_bound=1
)
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 32768, "Tokens of one batch.")
_TARGETS = flags.DEFINE_integer("targets", 512, "Last tokens that are decoded one by one.")
_SAMPLES = flags.DEFINE_integer("samples", 8, "Passkeys at each of five depths.", lower_bound=1)

type _MakeVariants = Callable[[int], Iterator[Variant]]  # From a sequence length.

_DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)


def main(argv: Sequence[str]) -> None:
  """Runs the missing jobs, most important first, then writes tables and plots."""
  del argv
  logging.set_verbosity(logging.WARNING)
  out = Path(_OUT.value)
  results = Results(out / "quality.jsonl")
  if not _REPORT_ONLY.value:
    model, _, tokenizer = load_model(_WORKDIR.value)
    family = Family(model, tokenizer.start_ids)
    pattern = re.compile(_JOBS.value)
    chosen = [job for job in make_jobs(family, tokenizer) if pattern.search(job.key)]
    if _LIST.value:
      print("\n".join(f"{'done ' if job.key in results else '     '}{job.key}" for job in chosen))
      return
    require_model(out, model)
    print(environment())
    origin = f"{_WORKDIR.value}, step {list_steps(_WORKDIR.value)[-1]}"
    missing = jobs.run_jobs(
      chosen, results, origin=origin, minutes=_MINUTES.value, workers=_WORKERS.value
    )
    print(f"{len(chosen) - missing} jobs are done, {missing} are missing.")
  for path in write_report(results, out):
    print(path)


def make_jobs(family: Family, tokenizer: Tokenizer) -> Iterator[jobs.Job]:
  """All jobs of the benchmark, most important first."""
  make = _JobFactory(family, tokenizer)
  lengths, prompts, long = (
    [int(length) for length in flag.value] for flag in (_LENGTHS, _PASSKEYS, _LONG)
  )
  yield from make.perplexities(lengths, variants.core)
  yield from make.passkeys(prompts, variants.core)
  yield from make.ablations(lengths[:1])
  yield from make.perplexities(lengths, variants.other_shares)
  yield from make.passkeys(prompts, variants.other_shares)
  for make_variants in (variants.grid, variants.switches, variants.paper_settings):
    yield from make.perplexities(lengths, make_variants)
    yield from make.passkeys(prompts, make_variants)
  yield from make.perplexities(long, variants.long_context, _LONG_BASE.value)
  yield from make.passkeys(long, variants.long_context, _LONG_BASE.value)
  yield from make.ablations(lengths[1:])


class _JobFactory:
  """Makes the jobs of one model on the documents of --documents."""

  def __init__(self, family: Family, tokenizer: Tokenizer) -> None:
    self._family, self._tokenizer = family, tokenizer
    self._documents = read_documents(_DOCUMENTS.value)[: _MAX_DOCUMENTS.value]
    self._hay = Haystack([document.text for document in self._documents], tokenizer)

  def perplexities(
    self, lengths: Sequence[int], make_variants: _MakeVariants, base: float | None = None
  ) -> Iterator[jobs.Job]:
    for length in lengths:
      settings = PerplexitySettings(
        batch_size=_batch_size(length), targets=_TARGETS.value, always_decode=False
      )
      for variant in make_variants(length):
        yield jobs.perplexity_job(
          self._family, _with_dtype_and_base(variant, base), self._rows(length), settings
        )

  def passkeys(
    self, lengths: Sequence[int], make_variants: _MakeVariants, base: float | None = None
  ) -> Iterator[jobs.Job]:
    for length in lengths:
      settings = jobs.RetrievalSettings(_DEPTHS, _SAMPLES.value, batch_size=_batch_size(length))
      for variant in make_variants(length):
        yield jobs.retrieval_job(
          self._family, self._tokenizer, self._hay, _with_dtype_and_base(variant, base), "passkey",
          length, settings,
        )  # fmt: skip

  def ablations(self, lengths: Sequence[int]) -> Iterator[jobs.Job]:
    for length in lengths:
      yield jobs.ablation_job(
        self._family, "DGA retrofit", RETROFIT, self._rows(length), _batch_size(length)
      )

  @functools.cache  # noqa: B019  # The object exists until the command ends.
  def _rows(self, length: int) -> np.ndarray:
    """Rows of `length` tokens, with about the same number of tokens in total for each length."""
    longest = max(map(int, _LENGTHS.value))
    return token_rows(self._documents, self._tokenizer, length, max(1, longest // length))


def write_report(results: Results, out: Path) -> Iterator[Path]:
  """Writes the tables and plots of all results; yields their paths."""
  everything = results.all()
  lengths = {result["length"] for result in everything}
  plotted = {variant.name for length in lengths for variant in variants.core(length)}
  for task in ("perplexity", "retrieval"):
    yield from report.write(task, everything, out, plotted=plotted)
  for result in everything:
    if result["task"] == "ablation":
      yield from _write_ablation(result, out)
  yield from _plot_passkeys_by_share(everything, out)


def _write_ablation(result: dict, out: Path) -> Iterator[Path]:
  """Writes the table, two plots and the raw numbers of an ablation."""
  length, dense, swaps = result["length"], result["swaps"]["dense"], result["swaps"]
  configured = swaps["as configured"]
  rows = [
    [name, f"{math.exp(loss):.3f}", f"{math.exp(loss - dense):.4f}", f"{loss - configured:+.4f}"]
    for name, loss in swaps.items()
  ]
  header = ["part", "perplexity", "over dense", "loss against the config"]
  table = out / f"ablation_{length}.md"
  table.write_text(report.markdown(header, rows) + "\n", encoding="utf-8")
  yield table
  for title, level in (("one_layer_dga", dense), ("one_layer_dense", configured)):
    path = out / f"ablation_{title}_{length}.png"
    change = [loss - level for loss in result[title]]
    label = "Loss against dense" if title == "one_layer_dga" else "Loss against DGA in every layer"
    name = title.replace("_", " ")
    plots.plot_by_layer(
      {name: change},
      path,
      y_label=f"{label} (nats per token)",
      title=report.title(f"Ablation: {name}", [result]),
      baselines={"no change": 0.0},
      standard_errors={name: result.get(f"{title}_errors")},
    )
    yield path
  raw = out / f"ablation_{length}.json"
  raw.write_text(json.dumps(result, indent=1), encoding="utf-8")
  yield raw


def _plot_passkeys_by_share(everything: list[dict], out: Path) -> Iterator[Path]:
  retrieval = [result for result in everything if result["task"] == "retrieval"]
  for length in sorted({result["length"] for result in retrieval}):
    path = out / f"passkey_by_share_{length}.png"
    at_length = [result for result in retrieval if result["length"] == length]
    plots.plot_against_share(
      report.by_method(at_length, report.passkey_values),
      path,
      y_label="Passkeys found",
      title=report.title("Passkeys by share of keys", at_length),
      from_0_to_1=True,
    )
    yield path


def _with_dtype_and_base(variant: Variant, base: float | None) -> Variant:
  overrides = {**variant.overrides, "dtype": _DTYPE.value}
  if base is not None:
    overrides["rope_base"] = base
  return Variant(variant.name, overrides, variant.keys)


def _batch_size(length: int) -> int:
  return max(1, _BATCH_TOKENS.value // length)


if __name__ == "__main__":
  app.run(main)
