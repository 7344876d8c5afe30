"""Facts in long texts and RULER's tasks, answered by one compiled program for a whole model.

`dga evaluate` compiles programs for each task, for the longest answers of that task. Here all
prompts of all tasks share one program, since a trained model is measured in a minute.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from benchmarks._forward import greedy_steps
from dga_jax.evaluation.losses import batches, fill
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
      new_tokens=recall.new_tokens, batch_size=recall.batch_size,
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


def greedy_answers(
  graphdef: nnx.GraphDef,
  params: Any,
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  *,
  new_tokens: int,
  batch_size: int,
  tick: Callable[[], Any] = lambda: None,
) -> list[str]:
  """The most likely continuation of each prompt, decoded with the attention kind's cache.

  Prompts are right-padded to one of two lengths, so at most two programs are compiled.

  Args:
    graphdef: of the decoder.
    params: its parameters.
    tokenizer: of the model; a stop token ends an answer.
    prompts: token ids of each prompt.
    new_tokens: most tokens of an answer.
    batch_size: prompts that run together.
    tick: called after every batch.
  """
  longest = max(map(len, prompts))
  order = sorted(range(len(prompts)), key=lambda index: 2 * len(prompts[index]) > longest)
  half = sum(2 * len(prompt) <= longest for prompt in prompts)
  answers: dict[int, str] = {}
  for indices, length in ((order[:half], longest // 2), (order[half:], longest)):
    rows = np.zeros((len(indices), length + 1), np.int32)  # The last column is the length.
    for row, index in zip(rows, indices, strict=True):
      row[: len(prompts[index])] = prompts[index]
      row[-1] = len(prompts[index])
    for start, batch in zip(
      range(0, len(rows), batch_size), batches(rows, batch_size), strict=True
    ):
      tokens_BxT = _continue(graphdef, params, fill(batch, batch_size), new_tokens)
      for index, tokens in zip(indices[start:], np.asarray(tokens_BxT), strict=False):
        stops = np.isin(tokens, tokenizer.stop_ids)
        end = int(stops.argmax()) if stops.any() else len(tokens)
        answers[index] = tokenizer.decode(tokens[:end].tolist())
      tick()
  return [answers[index] for index in range(len(prompts))]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _continue(
  graphdef: nnx.GraphDef, params: Any, rows_BxC: Int[Array, "B C"], new_tokens: int
) -> Int[Array, "B T"]:
  """The `new_tokens` most likely tokens after each prompt, one after another.

  Args:
    graphdef: of the decoder.
    params: its parameters.
    rows_BxC: right-padded prompts of C - 1 tokens, and the length of each in the last column.
    new_tokens: T.
  """
  model = nnx.merge(graphdef, params)
  prompts_BxL, lengths_B = rows_BxC[:, :-1], rows_BxC[:, -1]
  max_length = prompts_BxL.shape[1] + new_tokens
  logits_BxV, cache = model.prefill(prompts_BxL, lengths_B, max_length=max_length)

  first_B = logits_BxV.argmax(axis=-1).astype(jnp.int32)
  later_TxB = greedy_steps(model, first_B, cache, new_tokens - 1)
  return jnp.concatenate([first_B[None], later_TxB]).T
