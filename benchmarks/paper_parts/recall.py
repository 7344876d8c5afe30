"""Facts in long texts and RULER's tasks, answered by one compiled program for a whole model.

`dga evaluate` compiles programs for each task, for the longest answers of that task. Here all
prompts of all tasks share one program, since a trained model is measured in a minute.
"""

import dataclasses
from typing import Any

import numpy as np

from benchmarks._greedy_answers import greedy_answers
from dga_jax.evaluation.retrieval import exact_match, TASKS
from dga_jax.evaluation.ruler import RULER_TASKS, RulerTexts
from dga_jax.evaluation.variants import Family, Variant
from dga_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Recall:
  """Which prompts are answered.

  Attributes:
    lengths: tokens of the prompts of `retrieval.TASKS`, answers included; RULER's prompts have the
      last of them.
    depths: positions of the answer's sentence, as shares of a prompt of `retrieval.TASKS`.
    samples: prompts for each task, length and depth.
    ruler_samples: prompts of each task of RULER.
    new_tokens: most tokens of an answer.
    batch_size: prompts that run together.
    seed: of the texts, the facts and their positions.
  """

  lengths: tuple[int, ...] = (4096, 8192)
  depths: tuple[float, ...] = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
  samples: int = 2
  ruler_samples: int = 16
  new_tokens: int = 128
  batch_size: int = 32
  seed: int = 0


def measure_recall(
  family: Family, variant: Variant, tokenizer: Tokenizer, texts: RulerTexts, recall: Recall
) -> dict[str, Any]:
  """The shares of right answers of a variant of a model.

  Returns:
    "retrieval": for "TASK LENGTH" the dict of `exact_match`; "ruler": for each task the mean score
    and its standard error, None for one prompt; "answers": of RULER, pairs of right answers and
    prediction.
  """
  longest = recall.lengths[-1]
  samples = {
    f"{task} {length}": [
      texts.hay.sample(task, length, depth, seed=recall.seed, index=index)
      for depth in recall.depths
      for index in range(recall.samples)
    ]
    for task in TASKS
    for length in recall.lengths
  }
  parts = [texts.part(task, longest, recall.ruler_samples, recall.seed) for task in RULER_TASKS]
  prompts = [sample.tokens for some in samples.values() for sample in some]
  prompts += [prompt.tokens for part in parts for prompt in part.prompts]
  graphdef = family.graphdef(variant, longest)
  predictions = iter(
    greedy_answers(
      graphdef, family.params, tokenizer, prompts,
      new_tokens=[recall.new_tokens] * len(prompts), batch_size=recall.batch_size,
    )
  )  # fmt: skip
  retrieval = {
    name: exact_match([next(predictions) for _ in some], some) for name, some in samples.items()
  }
  ruler, answers = {}, {}
  for part in parts:
    pairs = [(list(prompt.answers), next(predictions)) for prompt in part.prompts]
    scores = np.array([part.score(text, right) for right, text in pairs])
    error = float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None
    ruler[part.name] = {"score": float(scores.mean()), "standard_error": error}
    answers[part.name] = pairs
  return {"retrieval": retrieval, "ruler": ruler, "answers": answers}
