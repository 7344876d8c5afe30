"""Quality against the share of the dense cache, with the same weights (dynamic m).

The authors answer on OpenReview that tasks need different m. Here one model is measured with one
setting of DGA for all heads at several shares, and with files of calibrated budgets (--budgets).
RULER's word tasks (common and frequent words) stand for summaries: the answer depends on the whole
text, and no single token decides. The other tasks need facts that one sentence tells.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper_parts.inputs import Inputs
from benchmarks.paper_parts.plots import label, make_figure, save
from benchmarks.paper_parts.recall import measure_recall, Recall
from dga_jax import DGAConfig
from dga_jax.cache import cache_size
from dga_jax.evaluation.jobs import Job
from dga_jax.evaluation.perplexity import measure_perplexity, PerplexitySettings
from dga_jax.evaluation.report import markdown
from dga_jax.evaluation.variants import Variant
from dga_jax.head_budgets import read_head_budgets

TASK = "shares"
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
_LENGTH = 8192
_ROWS_PER_BOOK = 1
_PERPLEXITY = PerplexitySettings(batch_size=8, always_decode=False)
_RECALL = Recall(lengths=(_LENGTH // 2, _LENGTH), samples=1)
_GROUPS = {
  "one fact": ("single", "multi_key", "variable_tracking"),
  "several facts": ("multi_value", "multi_query"),
  "words of the whole text": ("common_words", "frequent_words"),
}


def streaming(share: float, length: int) -> DGAConfig:
  """Blocks of 62 + 2 with the largest raw window whose cache has at most a share of the keys.

  Raises:
    ValueError: the share is too small even without a window.
  """
  fitting = None
  for window in range(length // 64):
    config = DGAConfig(
      selection="streaming", group_size=62, focal_per_block=2, sink_tokens=4, local_window=window
    )
    if cache_size(config=config, max_length=length).total > share * length:
      break
    fitting = config
  if fitting is None:
    raise ValueError(f"share is {share}; blocks of 62 + 2 need more keys of {length}.")
  return fitting


def make_jobs(inputs: Inputs) -> Iterator[Job]:
  """One job for dense attention, each share, and each file of budgets."""
  variants = [Variant("dense", {"attention": "dense"})]
  for share in SHARES:
    config = streaming(share, _LENGTH)
    variants.append(Variant(f"DGA 1/{1 / share:.0f}", {"attention": "dga", "dga": vars(config)}))
  for path in inputs.budgets:
    budgets = read_head_budgets(path).to_dict()
    overrides = {"attention": "head_budgets", "head_budgets": budgets}
    variants.append(Variant(Path(path).stem, overrides))
  for variant in variants:
    yield Job(
      fields={"task": TASK, "variant": variant.name, "length": _LENGTH},
      depends_on=[
        variant.config(inputs.family.config, _LENGTH).to_dict(),
        dataclasses.asdict(_RECALL),
        vars(_PERPLEXITY),
        [document.id for document in inputs.corpora[inputs.books]],
      ],
      ticks=1,
      run=functools.partial(_run, inputs, variant),
    )


def _run(inputs: Inputs, variant: Variant, tick: Callable[[], Any]) -> dict[str, Any]:
  rows = inputs.rows(inputs.books, _LENGTH, _ROWS_PER_BOOK)
  family = inputs.family
  loss = measure_perplexity(family, variant, rows, _PERPLEXITY)
  recall = measure_recall(family, variant, inputs.tokenizer, inputs.ruler_texts, _RECALL)
  tick()
  return {"perplexity": loss, **recall}


def write(results: Sequence[Mapping[str, Any]], out: Path) -> str:
  """Writes shares.png to a folder; returns the table."""
  results = sorted(results, key=lambda one: one["perplexity"]["budget"]["share"])
  dense = next((one for one in results if one["variant"] == "dense"), None)
  rows = []
  for one in results:
    ratio = ""
    if dense is not None:
      ratio = f"{np.exp(one['perplexity']['loss'] - dense['perplexity']['loss']):.3f}"
    passkeys = one["retrieval"][f"passkey {_LENGTH}"]
    rows.append(
      [
        one["variant"],
        f"{one['perplexity']['budget']['share']:.1%}",
        ratio,
        *(f"{_score(one, tasks):.0%}" for tasks in _GROUPS.values()),
        f"{passkeys['hits']} of {passkeys['samples']}",
      ]
    )
  figure, (axes,) = make_figure(1, "One model with several shares of the cache")
  for index, (name, tasks) in enumerate(_GROUPS.items()):
    for marker, kept, note in (
      ("o-", [one for one in results if one["variant"].startswith(("DGA", "dense"))], ""),
      ("s:", [one for one in results if not one["variant"].startswith("DGA")], ", calibrated"),
    ):
      if len(kept) > 1:
        shares = [one["perplexity"]["budget"]["share"] for one in kept]
        scores = [_score(one, tasks) for one in kept]
        axes.plot(shares, scores, marker, color=f"C{index}", ms=4, label=name + note)
  axes.set_xscale("log", base=2)
  axes.set_ylim(0, 1)
  axes.xaxis.set_major_formatter("{x:.3g}")
  axes.legend(fontsize=7, loc="upper left")
  label(axes, "RULER at 8192 tokens", "share of the dense cache", "score")
  save(figure, out / "shares.png")
  return markdown(["heads", "cache", "perplexity/dense", *_GROUPS, "passkeys at 8K"], rows)


def _score(result: Mapping[str, Any], tasks: Sequence[str]) -> float:
  return float(np.mean([result["ruler"][task]["score"] for task in tasks]))
