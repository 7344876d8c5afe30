"""Quality against the share of the dense cache, with the same weights (dynamic m).

The authors answer on OpenReview that tasks need different m. Here one model is measured with one
setting of DGA for all heads at several shares, and with files of calibrated budgets (--budgets).
Two measures stand for summaries, whose words depend on the whole text and on no single token:
RULER's word tasks (common and frequent words), and the kept gain of the context. The gain is how
much the loss of the last tokens of a novel falls when dense attention reads the tokens before them
and not only the last `_NEAR`; a share keeps as much of the gain as its own loss falls, in decoding.
The other tasks need facts that one sentence tells.
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
_ROWS_PER_BOOK = 4
_NEAR = 512  # Tokens of context of the loss that has no gain.
_ROW = PerplexitySettings(batch_size=8, targets=512, contexts=(_NEAR,), always_decode=False)
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
        vars(_ROW),
        [document.id for document in inputs.corpora[inputs.books]],
      ],
      ticks=1,
      run=functools.partial(_run, inputs, variant),
    )


def _run(inputs: Inputs, variant: Variant, tick: Callable[[], Any]) -> dict[str, Any]:
  rows = inputs.rows(inputs.books, _LENGTH, _ROWS_PER_BOOK)
  family = inputs.family
  loss = measure_perplexity(family, variant, rows, _ROW)
  recall = measure_recall(family, variant, inputs.tokenizer, inputs.ruler_texts, _RECALL)
  tick()
  return {"perplexity": loss, **recall}


def write(results: Sequence[Mapping[str, Any]], out: Path) -> str:
  """Writes shares.png to a folder; returns the table."""
  results = sorted(results, key=lambda one: one["perplexity"]["budget"]["share"])
  dense = next((one for one in results if one["variant"] == "dense"), None)
  rows = []
  for one in results:
    ratio, kept = "", ""
    if dense is not None:
      ratio = f"{np.exp(one['perplexity']['loss'] - dense['perplexity']['loss']):.3f}"
      kept = f"{_kept_gain(one, dense):.0%}"
    passkeys = one["retrieval"][f"passkey {_LENGTH}"]
    rows.append(
      [
        one["variant"],
        f"{one['perplexity']['budget']['share']:.1%}",
        ratio,
        kept,
        *(f"{_score(one, tasks):.0%}" for tasks in _GROUPS.values()),
        f"{passkeys['hits']} of {passkeys['samples']}",
      ]
    )
  if dense is not None:
    _plot(results, dense, out / "shares.png")
  header = ["heads", "cache", "perplexity/dense", "kept gain of the context", *_GROUPS]
  return markdown([*header, "passkeys at 8K"], rows)


def _kept_gain(result: Mapping[str, Any], dense: Mapping[str, Any]) -> float:
  """The share of the gain of the context that a result keeps; 1 for dense attention."""
  near = dense["perplexity"]["restart"][0]["loss"]
  own, best = (one["perplexity"]["last"]["decoded_loss"] for one in (result, dense))
  return float((near - own) / (near - best))


def _plot(results: Sequence[Mapping[str, Any]], dense: Mapping[str, Any], path: Path) -> None:
  """RULER's scores and the kept gain of the context over the share of the cache."""
  figure, (by_task, gain) = make_figure(2, "One model with several shares of the cache")
  own = [one for one in results if one["variant"].startswith(("DGA", "dense"))]
  calibrated = [one for one in results if not one["variant"].startswith(("DGA", "dense"))]
  for style, kept, note in (("o-", own, ""), ("s:", calibrated, ", calibrated")):
    shares = [one["perplexity"]["budget"]["share"] for one in kept]
    if not shares:
      continue
    for index, (name, tasks) in enumerate(_GROUPS.items()):
      scores = [_score(one, tasks) for one in kept]
      by_task.plot(shares, scores, style, color=f"C{index}", ms=4, label=name + note)
    gains = [_kept_gain(one, dense) for one in kept]
    gain.plot(shares, gains, style, color="C3", ms=4, label=f"kept gain{note}")
  for axes in (by_task, gain):
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.legend(fontsize=7)
  by_task.set_ylim(bottom=0)
  gain.axhline(1, color="black", lw=0.8)
  label(by_task, f"RULER at {_LENGTH} tokens", "share of the dense cache", "score")
  label(
    gain, f"gain of {_LENGTH} tokens of context over {_NEAR}", "share of the dense cache",
    "kept share of the gain",
  )  # fmt: skip
  save(figure, path)


def _score(result: Mapping[str, Any], tasks: Sequence[str]) -> float:
  return float(np.mean([result["ruler"][task]["score"] for task in tasks]))
