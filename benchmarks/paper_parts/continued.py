"""Continued pretraining (Tables 1 and 2): one run of the trainer for each attention kind.

All runs start from the same model and have the same data, steps and learning rate
(configs/smollm2_continued.py). Each has three results: the training itself, the loss by position on
held-out books, and the answers to prompts in which facts are told and asked for later. Where files
of LongBench-E or of questions about many documents are given, their scores are a fourth. The run
"untrained" is the model before training.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper_parts.inputs import Inputs
from benchmarks.paper_parts.pretraining import Pretraining
from benchmarks.paper_parts.question_sets import measure_question_sets
from benchmarks.paper_parts.recall import measure_recall
from dga_jax.checkpoint import load_model
from dga_jax.evaluation.jobs import Job
from dga_jax.evaluation.perplexity import measure_perplexity
from dga_jax.evaluation.variants import Family, Variant
from dga_jax.head_budgets import read_head_budgets
from train.config import to_dict, TrainConfig
from train.data.pipeline import load_data
from train.metrics import read_metrics
from train.setup import train
from train.stop_signals import StopSignals

TASK = "continued"
UNTRAINED = "untrained"
_STEPS_OF_SPEED = 32


class _Models:
  """The model of one run at a time."""

  def __init__(self) -> None:
    self._last: tuple[str, Family] | None = None

  def family(self, workdir: str) -> Family:
    """The newest model of a workdir, with its own attention kind."""
    if self._last is None or self._last[0] != workdir:
      self._last = None  # The memory of the model before.
      model, _, tokenizer = load_model(workdir)
      self._last = (workdir, Family(model, tokenizer.start_ids))
    return self._last[1]


def make_jobs(inputs: Inputs) -> Iterator[Job]:
  """The preparation of the data, then three jobs for each seed and run; two for the model before.

  Without `inputs.pretraining` there are none. After a signal no job starts.
  """
  for job in _jobs(inputs):
    run = functools.partial(_unless_stopped, inputs.signals, job.run)
    yield dataclasses.replace(job, run=run)


def _unless_stopped(
  signals: StopSignals | None,
  run: Callable[[Callable[[], Any]], dict[str, Any]],
  tick: Callable[[], Any],
) -> dict[str, Any]:
  if signals is not None and signals.asked:
    raise InterruptedError("A signal stopped the command. The same command continues it.")
  return run(tick)


def _jobs(inputs: Inputs) -> Iterator[Job]:
  settings = inputs.pretraining
  if settings is None:
    return
  models = _Models()
  dense = settings.config("dense", 0, inputs.workdir)
  yield _job("data", 0, "prepared", dense, functools.partial(_prepare, dense, inputs, settings))
  yield from _evaluation_jobs(inputs, settings, models, UNTRAINED, dense, inputs.workdir)
  for seed in settings.seeds:
    for run in settings.runs:
      config = settings.config(run, seed, inputs.workdir)
      name = Path(run).stem
      workdir = settings.folder / f"{name}_{seed}"
      run_to_end = functools.partial(_train, config, workdir, inputs.signals)
      yield _job(name, seed, "train", config, run_to_end)
      yield from _evaluation_jobs(inputs, settings, models, name, config, str(workdir))


def _evaluation_jobs(
  inputs: Inputs,
  settings: Pretraining,
  models: _Models,
  run: str,
  config: TrainConfig,
  workdir: str,
) -> Iterator[Job]:
  length = config.data.sequence_length
  # An imported model may have another dtype than the runs, in which dense attention is slower.
  variant = Variant(run, {"dtype": config.model.dtype})

  def loss() -> dict[str, Any]:
    per_book = -(-settings.rows // len(inputs.corpora[inputs.books]))
    rows = inputs.rows(inputs.books, length, per_book)
    return measure_perplexity(models.family(workdir), variant, rows, settings.perplexity)

  def recall() -> dict[str, Any]:
    family = models.family(workdir)
    return measure_recall(family, variant, inputs.tokenizer, inputs.ruler_texts, settings.recall)

  def questions() -> dict[str, Any]:
    return measure_question_sets(
      models.family(workdir), variant, inputs.tokenizer, length, settings.question_sets
    )

  seed = config.seed
  yield _job(run, seed, "loss", config, loss, settings.rows, vars(settings.perplexity))
  yield _job(run, seed, "recall", config, recall, dataclasses.asdict(settings.recall))
  if settings.question_sets:
    yield _job(run, seed, "questions", config, questions, settings.question_sets.names())


def _job(
  run: str,
  seed: int,
  measure: str,
  config: TrainConfig,
  function: Callable[[], dict[str, Any]],
  *settings: Any,
) -> Job:
  def measured(tick: Callable[[], Any]) -> dict[str, Any]:
    result = function()
    tick()
    return result

  values = to_dict(config)
  values.pop("init_from")  # Paths of one machine are no part of a result.
  if config.budgets is not None:
    values["budgets"] = read_head_budgets(config.budgets).to_dict()
  values["data"].pop("cache_dir")
  for name in ("train_files", "validation_files"):
    values["data"][name] = [Path(file).name for file in getattr(config.data, name)]
  return Job(
    fields={"task": TASK, "run": run, "seed": seed, "measure": measure},
    depends_on=[values, *settings],
    ticks=1,
    run=measured,
  )


def _prepare(config: TrainConfig, inputs: Inputs, settings: Pretraining) -> dict[str, Any]:
  """Tokenizes the data once; the runs find them in the same folder.

  "rows" and "reads" are the training rows of each corpus, and how often a run reads them.
  """
  begin = time.perf_counter()
  data = load_data(
    config.data, settings.folder, seed=0, batch_size=config.batch_size, tokenizer=inputs.tokenizer
  )
  data.close()
  seconds = time.perf_counter() - begin
  reads = data.reads(config.data, config.num_steps * config.batch_size)
  return {
    "bytes": {Path(file).name: Path(file).stat().st_size for file in config.data.train_files},
    "rows": {Path(file).name: rows for file, rows in data.train_rows.items()},
    "reads": {Path(file).name: round(times, 4) for file, times in reads.items()},
    "preparation_seconds": seconds,
  }


def _train(config: TrainConfig, workdir: Path, signals: StopSignals | None) -> dict[str, Any]:
  """Trains or continues the run; the numbers of its metrics.jsonl.

  "tokens_per_second" and "mfu" are the largest medians of 32 steps: those of a run that has the
  device to itself. "training_seconds" sums the steps.

  Raises:
    InterruptedError: a signal stopped the run; its step is saved.
  """
  if not train(config, workdir, signals=signals):
    raise InterruptedError(f"The run in {workdir} was stopped. The same command continues it.")
  records = read_metrics(workdir)
  steps = [record for record in records if "loss" in record]
  held_out = [record for record in records if "eval_loss" in record]
  memory = ("device_memory_bytes", "host_memory_bytes")
  return {
    "steps": config.num_steps,
    "tokens": config.num_steps * config.batch_size * config.data.sequence_length,
    "losses": [round(record["loss"], 4) for record in steps],
    "held_out": [
      {
        "step": record["step"],
        "losses": {Path(name).name: loss for name, loss in record["eval_loss_by_corpus"].items()},
      }
      for record in held_out
    ],
    "training_seconds": sum(record.get("step_seconds", 0.0) for record in steps),
    "data_wait_seconds": sum(record["data_wait_seconds"] for record in steps),
    **{name: _largest_median(steps, name) for name in ("tokens_per_second", "mfu")},
    **{name: steps[-1][name] for name in memory if name in steps[-1]},
  }


def _largest_median(steps: Sequence[Mapping[str, Any]], name: str) -> float:
  values = np.array([record[name] for record in steps if name in record])
  windows = np.lib.stride_tricks.sliding_window_view(values, min(len(values), _STEPS_OF_SPEED))
  return float(np.median(windows, axis=1).max())
