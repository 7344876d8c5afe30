"""LongBench-E and questions about many documents, answered by a trained model."""

import dataclasses
from pathlib import Path
from typing import Any

from dga_jax.evaluation.task_jobs import TaskJobs
from dga_jax.evaluation.variants import Family, Variant
from dga_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class QuestionSets:
  """Files of questions.

  Attributes:
    longbench: folder with LongBench-E's files; None for none.
    questions: file with the questions of Liu et al.; None for none.
    limit: largest number of examples of a file; None for all.
    batch_size: prompts that run together.
  """

  longbench: str | None = None
  questions: str | None = None
  limit: int | None = None
  batch_size: int = 8

  def __bool__(self) -> bool:
    return self.longbench is not None or self.questions is not None

  def names(self) -> list[str | int | None]:
    """What identifies the questions in a file of results, without paths of one machine."""
    files = (self.longbench, self.questions)
    return [*(None if file is None else Path(file).name for file in files), self.limit]


def measure_question_sets(
  family: Family, variant: Variant, tokenizer: Tokenizer, length: int, sets: QuestionSets
) -> dict[str, Any]:
  """The scores of a variant of a model.

  Args:
    family: the model.
    variant: of the model.
    tokenizer: of the model.
    length: tokens of a prompt and its answer at most. LongBench's prompts are cut in the middle.
    sets: the files.

  Returns:
    "scores": by data set the score of LongBench-E in percent, and under "many documents" the
    percentage of right answers; "results": all that `dga evaluate` measures, by the same names.

  Raises:
    OSError: a file cannot be read.
    ValueError: a file is not in its authors' format, or a question exceeds `length` tokens.
  """
  make = TaskJobs(family, tokenizer, [variant], [length])
  scores, results = {}, {}
  if sets.longbench is not None:
    for job in make.longbench(sets.longbench, sets.limit, sets.batch_size):
      name = str(job.fields["dataset"])
      results[name] = job.run(_no_tick)
      scores[name] = results[name]["score"]["all"]
  if sets.questions is not None:
    for job in make.lost_in_the_middle(sets.questions, sets.limit, sets.batch_size):
      results["many documents"] = job.run(_no_tick)
      scores["many documents"] = 100 * results["many documents"]["share"]
  return {"scores": scores, "results": results}


def _no_tick() -> None:
  pass
