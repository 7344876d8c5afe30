"""Settings of the runs of continued pretraining, which all runs have in common."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.paper_parts.question_sets import QuestionSets
from benchmarks.paper_parts.recall import Recall
from configs.smollm2_continued import DEFAULT_RUNS, get_config
from dga_jax.evaluation.perplexity import PerplexitySettings
from train.config import make_config, TrainConfig

_PERPLEXITY = PerplexitySettings(batch_size=12, targets=512, always_decode=False)


@dataclasses.dataclass(frozen=True)
class Pretraining:
  """What the runs have in common.

  Attributes:
    folder: for the runs.
    cache_dir: for the prepared data, which processes may share.
    train_files: two entries with equal weights: books, and documents of train.make_facts.
    validation_files: two entries of held-out text of the same kinds; none to hold out a part of
      `train_files`.
    runs: names in configs.smollm2_continued.RUNS, or JSON files of head budgets.
    seeds: of the order of the data.
    overrides: values of TrainConfig that differ from the config file.
    rows: of the held-out loss, an equal number from each book.
    perplexity: settings of the held-out loss.
    recall: the prompts.
    question_sets: further prompts, from files.
  """

  folder: Path
  cache_dir: Path
  train_files: tuple[str, str]
  validation_files: tuple[str, ...] = ()
  runs: tuple[str, ...] = DEFAULT_RUNS
  seeds: tuple[int, ...] = (0,)
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  rows: int = 24
  perplexity: PerplexitySettings = _PERPLEXITY
  recall: Recall = dataclasses.field(default_factory=Recall)
  question_sets: QuestionSets = dataclasses.field(default_factory=QuestionSets)

  def config(self, run: str, seed: int, init_from: str) -> TrainConfig:
    """The training config of a run."""
    values = get_config(run)
    values.update(self.overrides)
    values.seed, values.init_from = seed, init_from
    values.data.train_files = self.train_files
    values.data.validation_files = self.validation_files
    values.data.cache_dir = str(self.cache_dir)
    return make_config(values)
