"""The jobs of each task of the `evaluate` command: one for every length and variant."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from dga_jax.evaluation import longbench, lost_in_the_middle
from dga_jax.evaluation.jobs import (
  Job,
  longbench_job,
  lost_in_the_middle_job,
  perplexity_job,
  retrieval_job,
  RetrievalSettings,
  ruler_job,
)
from dga_jax.evaluation.perplexity import PerplexitySettings
from dga_jax.evaluation.retrieval import Haystack
from dga_jax.evaluation.ruler import RulerTexts
from dga_jax.evaluation.ruler_qa import read_question_set
from dga_jax.evaluation.texts import Document, token_rows
from dga_jax.evaluation.variants import Family, Variant
from dga_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class RulerSettings:
  """The prompts of RULER.

  Attributes:
    samples: prompts of each task.
    seed: of the texts, the facts and their positions.
    batch_size: prompts that run together.
  """

  samples: int
  seed: int = 0
  batch_size: int = 1


@dataclasses.dataclass(frozen=True)
class TaskJobs:
  """Makes the jobs of a task for every combination of length and variant.

  Jobs of the same length and variant are neighbours, since they share compiled programs.

  Attributes:
    family: the model.
    tokenizer: of the model.
    variants: attention kinds and settings to measure.
    lengths: sequence lengths in tokens.
  """

  family: Family
  tokenizer: Tokenizer
  variants: Sequence[Variant]
  lengths: Sequence[int]

  def perplexity(
    self, documents: Sequence[Document], rows_per_document: int, settings: PerplexitySettings
  ) -> Iterator[Job]:
    """Loss by position on the documents."""
    for length in self.lengths:
      rows = token_rows(documents, self.tokenizer, length, rows_per_document)
      for variant in self.variants:
        yield perplexity_job(self.family, variant, rows, settings)

  def retrieval(
    self, documents: Sequence[Document], puzzles: Sequence[str], settings: RetrievalSettings
  ) -> Iterator[Job]:
    """Facts hidden in the documents, by the names in `retrieval.TASKS`."""
    hay = Haystack([document.text for document in documents], self.tokenizer)
    for length, variant, puzzle in itertools.product(self.lengths, self.variants, puzzles):
      yield retrieval_job(self.family, self.tokenizer, hay, variant, puzzle, length, settings)

  def ruler(
    self,
    documents: Sequence[Document],
    tasks: Sequence[str],
    questions: str | Path | None,
    settings: RulerSettings,
  ) -> Iterator[Job]:
    """RULER: tasks made by code, by their names in RULER_TASKS, and questions from a file.

    Args:
      documents: long texts, for the tasks made by code.
      tasks: names.
      questions: a file of SQuAD or HotpotQA; None for none.
      settings: of the prompts.
    """
    texts = RulerTexts([one.text for one in documents], self.tokenizer) if tasks else None
    asked = read_question_set(questions) if questions else None
    for length in self.lengths:
      parts = []
      if texts:
        parts += [texts.part(task, length, settings.samples, settings.seed) for task in tasks]
      if asked:
        parts.append(asked.part(self.tokenizer, length, settings.samples, settings.seed))
      for variant, part in itertools.product(self.variants, parts):
        yield ruler_job(self.family, self.tokenizer, part, variant, length, settings.batch_size)

  def longbench(self, folder: str | Path, limit: int | None, batch_size: int) -> Iterator[Job]:
    """The data sets of LongBench-E that a folder contains."""
    for one in longbench.read_sets(folder, limit):
      for length in self.lengths:
        for variant in self.variants:
          yield longbench_job(self.family, self.tokenizer, one, variant, length, batch_size)

  def lost_in_the_middle(
    self, path: str | Path, limit: int | None, batch_size: int
  ) -> Iterator[Job]:
    """The questions of Liu et al. in a file."""
    questions = lost_in_the_middle.read_questions(path, limit)
    for length in self.lengths:
      for variant in self.variants:
        yield lost_in_the_middle_job(
          self.family, self.tokenizer, questions, variant, length, batch_size
        )
