"""RULER's scores of sets of head budgets, decoded greedily in the program of all sets."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from benchmarks._assigned_generation import continue_prompts, IsDone
from dga_jax.calibration.program import AssignedDecoder
from dga_jax.evaluation.results import Results
from dga_jax.evaluation.ruler import RulerPart
from dga_jax.tokenizer import Tokenizer


def measure_part(
  decoder: AssignedDecoder,
  assignment: Int[np.ndarray, "K N"],
  part: RulerPart,
  tokenizer: Tokenizer,
  shape: tuple[int, int],
  guesses: Sequence[Sequence[int]],
  results: Results,
) -> dict[str, Any]:
  """The score of each prompt and its new tokens, from the file of results if it has them.

  A continuation ends at a stop token, when all answers are found, or after the task's number of new
  tokens. What follows the last answer does not change the score.

  Args:
    decoder: whose settings the assignment counts.
    assignment: the setting of each KV head.
    part: prompts and answers.
    tokenizer: of the model.
    shape: rows and tokens of a batch.
    guesses: for each prompt, tokens that are likely to follow.
    results: the file.

  Returns:
    "score" and "new_tokens" of each prompt.
  """
  settings = [[repr(decoder.candidates[index]) for index in row] for row in assignment]
  prompts = [(one.tokens, one.answers) for one in part.prompts]
  content = json.dumps([settings, prompts, part.new_tokens])
  key = f"ruler {part.name} {shape[1]} {hashlib.sha256(content.encode()).hexdigest()[:16]}"
  if key not in results:
    answered = continue_prompts(
      decoder,
      assignment,
      [one.tokens for one in part.prompts],
      guesses,
      [_is_done(part, one.answers, tokenizer) for one in part.prompts],
      new_tokens=part.new_tokens,
      shape=shape,
    )
    new_tokens = [_without_stop(tokens, tokenizer) for tokens in answered]
    scores = [
      part.score(tokenizer.decode(tokens), one.answers)
      for tokens, one in zip(new_tokens, part.prompts, strict=True)
    ]
    results.add(key, {"score": scores, "new_tokens": new_tokens})
  return results[key]


def _is_done(part: RulerPart, answers: Sequence[str], tokenizer: Tokenizer) -> IsDone:
  def is_done(tokens: list[int]) -> bool:
    if tokens[-1] in tokenizer.stop_ids:
      return True
    # The token after the last answer must end its word.
    return all(part.score(tokenizer.decode(text), answers) == 1 for text in (tokens[:-1], tokens))

  return is_done


def _without_stop(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
  return tokens[:-1] if tokens[-1] in tokenizer.stop_ids else tokens
