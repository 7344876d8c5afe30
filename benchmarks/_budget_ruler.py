"""RULER's scores of sets of head budgets, decoded greedily with their caches."""

import concurrent.futures
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence

import numpy as np
from flax import nnx
from jaxtyping import Float

from benchmarks._greedy_answers import compile_answers, greedy_answers
from dga_jax.checkpoint import abstract_decoder
from dga_jax.evaluation.results import Results
from dga_jax.evaluation.ruler import RulerPart
from dga_jax.head_budgets import HeadBudgets
from dga_jax.model import apply_budgets, Decoder
from dga_jax.tokenizer import Tokenizer

_BATCH_SIZE = 32  # Prompts that run together; a step of decoding takes hardly longer than for one.


class BudgetRuler:
  """Answers the prompts of RULER's tasks of one length under several head budgets.

  The prompts of all tasks run in one program, which each set has for itself: prefill, and decoding
  with the set's cache.

  Args:
    model: a decoder without head budgets.
    tokenizer: of the model.
    parts: the prompts.
    results: the file of results. What it has is not measured again.
  """

  def __init__(
    self, model: Decoder, tokenizer: Tokenizer, parts: Sequence[RulerPart], results: Results
  ) -> None:
    self._model, self._tokenizer = model, tokenizer
    self._parts, self._results = tuple(parts), results
    self._prompts = [prompt.tokens for part in parts for prompt in part.prompts]
    self._new_tokens = [part.new_tokens for part in parts for _ in part.prompts]
    self._batch_size = min(_BATCH_SIZE, len(self._prompts))

  def compile(self, sets: Sequence[HeadBudgets]) -> None:
    """Compiles the programs of the sets whose results are missing, all at the same time."""
    begin = time.perf_counter()
    missing = [one for one in dict.fromkeys(sets) if self._key(one) not in self._results]
    if not missing:
      return
    params = nnx.state(self._model, nnx.Param)

    def compile_one(budgets: HeadBudgets) -> None:
      compile_answers(
        self._graphdef(budgets), params, self._prompts,
        new_tokens=self._new_tokens, batch_size=self._batch_size,
      )  # fmt: skip

    with concurrent.futures.ThreadPoolExecutor(len(missing)) as pool:
      for done in [pool.submit(compile_one, one) for one in missing]:
        done.result()
    took = time.perf_counter() - begin
    print(f"{len(missing)} sets compiled for RULER in {took:.0f} s", flush=True)

  def scores(self, budgets: HeadBudgets) -> list[Float[np.ndarray, "P"]]:
    """The score of each prompt of each part, from 0 to 1."""
    key = self._key(budgets)
    if key not in self._results:
      params = nnx.state(apply_budgets(self._model, budgets), nnx.Param)
      texts = iter(
        greedy_answers(
          self._graphdef(budgets), params, self._tokenizer, self._prompts,
          new_tokens=self._new_tokens, batch_size=self._batch_size,
        )
      )  # fmt: skip
      answers = [[next(texts) for _ in part.prompts] for part in self._parts]
      scores = [
        [part.score(text, one.answers) for text, one in zip(own, part.prompts, strict=True)]
        for own, part in zip(answers, self._parts, strict=True)
      ]
      self._results.add(key, {"scores": scores, "answers": answers})
    return [np.array(one, float) for one in self._results[key]["scores"]]

  def _graphdef(self, budgets: HeadBudgets) -> nnx.GraphDef:
    """The structure of `apply_budgets(model, budgets)`."""
    config = dataclasses.replace(
      self._model.config, attention="head_budgets", head_budgets=budgets.arranged()
    )
    return abstract_decoder(config)[0]

  def _key(self, budgets: HeadBudgets) -> str:
    settings = [[repr(budgets.settings[index]) for index in row] for row in budgets.assignment]
    parts = [(part.name, part.prompts, part.new_tokens) for part in self._parts]
    content = json.dumps([settings, parts])
    return f"ruler {hashlib.sha256(content.encode()).hexdigest()[:16]}"
