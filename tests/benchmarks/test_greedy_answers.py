"""Greedy answers of benchmarks equal the engine's, and RULER's scores of budgets are theirs."""

import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks._budget_ruler import BudgetRuler
from benchmarks._greedy_answers import compile_answers, greedy_answers
from dga_jax.calibration.run import make_budgets
from dga_jax.evaluation.results import Results
from dga_jax.evaluation.ruler import RulerPart, RulerPrompt
from dga_jax.evaluation.variants import Variant
from dga_jax.generation import generate, Sampling
from dga_jax.head_budgets import HeadBudgets
from dga_jax.model import apply_budgets
from tests.dga_jax.calibration import small
from tests.dga_jax.evaluation.tiny import family, STORY, TOKENIZER

OWN = Variant("own")
PROMPTS = [TOKENIZER.encode(STORY * 2)[:size] for size in (40, 70, 80)]
FULL = make_budgets(small.CANDIDATES, np.zeros(small.SHAPE, int))
MIXED = make_budgets(small.CANDIDATES, np.array([[1, 0], [2, 1], [0, 1]]))


def test_greedy_answers_are_those_of_the_engine() -> None:
  model, new_tokens = family(), [9, 5, 9]
  got = greedy_answers(
    model.graphdef(OWN, 80), model.params, TOKENIZER, PROMPTS, new_tokens=new_tokens, batch_size=2
  )
  alone = model.answers(OWN, 89, TOKENIZER, batch_size=1)
  want = [alone([one], count)[0] for one, count in zip(PROMPTS, new_tokens, strict=True)]
  assert got == want


def test_compiled_answers_compile_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
  model = family(mlp_dim=32)  # No other test has compiled this shape.
  graphdef = model.graphdef(OWN, 80)
  shapes = jax.eval_shape(lambda: model.params)
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    compile_answers(graphdef, shapes, PROMPTS, new_tokens=[3] * 3, batch_size=2)
    assert caplog.text.count("Compiling jit(_continue)") == 2  # 40 tokens, and 70 and 80.
    greedy_answers(graphdef, model.params, TOKENIZER, PROMPTS, new_tokens=[3] * 3, batch_size=2)
  assert caplog.text.count("Compiling jit(_continue)") == 2


def engine_tokens(budgets: HeadBudgets) -> list[list[int]]:
  model = apply_budgets(small.decoder(), budgets)
  return generate(model, PROMPTS, max_new_tokens=6, sampling=Sampling(temperature=0.0)).tokens


def test_ruler_scores_every_set_by_its_own_decoder(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  full, mixed = engine_tokens(FULL), engine_tokens(MIXED)
  assert all(a != b for a, b in zip(full, mixed, strict=True))

  def score(prediction: str, answers: Sequence[str]) -> float:
    return float(prediction == answers[0])

  def scores(long: Sequence[list[int]], short: list[int]) -> list[list[list[float]]]:
    asked = [
      RulerPrompt(prompt, (TOKENIZER.decode(tokens),))
      for prompt, tokens in zip([*PROMPTS, PROMPTS[0]], [*long, short], strict=True)
    ]
    parts = [RulerPart("single", asked[:3], score, 6), RulerPart("words", asked[3:], score, 2)]
    ruler = BudgetRuler(small.decoder(), TOKENIZER, parts, Results(tmp_path / "results.jsonl"))
    ruler.compile([FULL, MIXED, FULL])
    return [[one.tolist() for one in ruler.scores(budgets)] for budgets in (FULL, MIXED)]

  # Each prompt has the right answer of one of the two sets.
  measured = scores([mixed[0], *full[1:]], mixed[0][:2])
  assert measured == [[[0, 1, 1], [0]], [[1, 0, 0], [1]]]
  assert "2 sets compiled" in capsys.readouterr().out
  assert scores([mixed[0], *full[1:]], mixed[0][:2]) == measured
  assert "compiled" not in capsys.readouterr().out  # The file has every result.
  assert scores(mixed, mixed[0]) == [[[0, 0, 0], [0]], [[1, 1, 1], [0]]]  # Other answers.
