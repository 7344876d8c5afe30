"""Greedy decoding in the program of all sets equals the engine's, whatever the guesses are."""

import numpy as np
import pytest

from benchmarks._assigned_generation import continue_prompts
from benchmarks._budget_ruler import measure_part
from dga_jax.calibration.program import AssignedDecoder
from dga_jax.calibration.run import make_budgets
from dga_jax.evaluation.results import Results
from dga_jax.evaluation.ruler import ruler_recall, RulerPart, RulerPrompt
from dga_jax.generation import generate, Sampling
from dga_jax.model import apply_budgets
from tests.dga_jax.calibration import small
from tests.dga_jax.evaluation import tiny

ASSIGNMENT = np.array([[1, 0], [2, 1], [0, 1]])
NEW = 7
SHAPE = (2, 96)


@pytest.fixture(scope="module")
def decoder() -> AssignedDecoder:
  return AssignedDecoder(small.decoder(), small.CANDIDATES)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, size).tolist() for size in (40, 7, 80)]


@pytest.fixture(scope="module")
def wanted(prompts: list[list[int]]) -> list[list[int]]:
  model = apply_budgets(small.decoder(), make_budgets(small.CANDIDATES, ASSIGNMENT))
  greedy = Sampling(temperature=0.0)
  return generate(model, prompts, max_new_tokens=NEW, sampling=greedy).tokens


def continued(
  decoder: AssignedDecoder, prompts: list[list[int]], guesses: list[list[int]], stop: int = -1
) -> list[list[int]]:
  return continue_prompts(
    decoder, ASSIGNMENT, prompts, guesses, [lambda new: new[-1] == stop] * len(prompts),
    new_tokens=NEW, shape=SHAPE,
  )  # fmt: skip


def test_tokens_are_those_of_the_engine(
  decoder: AssignedDecoder, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
  assert len({tuple(tokens) for tokens in wanted}) == 3
  assert continued(decoder, prompts, [[], [], []]) == wanted
  half_right = [[*tokens[:3], 5, *tokens[4:]] for tokens in wanted]
  assert continued(decoder, prompts, half_right) == wanted
  assert continued(decoder, prompts, [*half_right[:2], [3] * 99]) == wanted


def test_right_guesses_take_one_pass(
  decoder: AssignedDecoder,
  prompts: list[list[int]],
  wanted: list[list[int]],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  passes, run = [], AssignedDecoder.run_layers
  monkeypatch.setattr(
    AssignedDecoder,
    "run_layers",
    lambda *args: passes.append(1) or run(*args),  # type: ignore[func-returns-value]
  )
  assert continued(decoder, prompts, wanted) == wanted
  assert len(passes) == 2  # Three prompts in batches of two.


def test_a_continuation_ends_where_it_is_done(
  decoder: AssignedDecoder, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
  stop = wanted[1][2]
  got = continued(decoder, prompts, [[], [], []], stop)
  for tokens, whole in zip(got, wanted, strict=True):
    assert tokens == whole[: whole.index(stop) + 1 if stop in whole else NEW]


def test_a_score_does_not_depend_on_the_early_end(
  decoder: AssignedDecoder, prompts: list[list[int]], wanted: list[list[int]], tmp_path: object
) -> None:
  texts = [tiny.TOKENIZER.decode(tokens) for tokens in wanted]
  answers = [("missing",), (texts[1][:2],), (texts[2],)]
  part = RulerPart(
    "single",
    [RulerPrompt(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)],
    ruler_recall,
    NEW,
  )
  results = Results(f"{tmp_path}/results.jsonl")
  got = measure_part(decoder, ASSIGNMENT, part, tiny.TOKENIZER, SHAPE, [[], [], []], results)
  assert got["score"] == [
    ruler_recall(text, answer) for text, answer in zip(texts, answers, strict=True)
  ]
  assert got["new_tokens"][0] == wanted[0]
  again = measure_part(
    decoder, ASSIGNMENT, part, tiny.TOKENIZER, SHAPE, wanted, Results(f"{tmp_path}/results.jsonl")
  )
  assert again == got


def test_a_prompt_must_fit(decoder: AssignedDecoder) -> None:
  with pytest.raises(ValueError, match="rows of 96 tokens; a prompt and its answer take 97"):
    continued(decoder, [[1] * 90], [[]])
