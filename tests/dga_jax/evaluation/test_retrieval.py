"""Retrieval prompts: exact length, depth, answers that the text determines, repeatability."""

import random
import re

import numpy as np
import pytest

from dga_jax.evaluation import retrieval
from dga_jax.evaluation.answers import answer
from dga_jax.evaluation.retrieval import exact_match, Haystack, NEW_TOKENS, Sample, TASKS
from dga_jax.evaluation.variants import Variant
from dga_jax.generation import ContinuousBatching
from tests.dga_jax.evaluation.tiny import family, STORY, TOKENIZER

HAY = Haystack([STORY * 40, STORY * 2], TOKENIZER)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_their_length_and_repeat(task: str) -> None:
  sample = HAY.sample(task, 1500, 0.5, seed=1, index=0)
  assert len(sample.tokens) == 1500 - NEW_TOKENS
  assert sample.tokens[0] == TOKENIZER.end_id
  assert HAY.sample(task, 1500, 0.5, seed=1, index=0) == sample
  assert HAY.sample(task, 1500, 0.5, seed=1, index=1) != sample
  assert HAY.sample(task, 1500, 0.5, seed=2, index=0) != sample


def solve(task: str, text: str) -> str:
  """Derives the answer from the text of the prompt."""
  body, _, question = text.rpartition("\n\n")
  if task == "key_value":
    name = question.rpartition("[")[2].rstrip(":")
    return re.search(rf"\[{name}: (\d+)\]", body)[1]
  if task == "variable_tracking":
    value = question.split()[-4]
    while not value.isdigit():
      value = re.search(rf"Let variable {value} be equal to (?:variable )?(\w+)\.", body)[1]
    return value
  stem = re.split(r"\? ", question)[1]
  return re.search(rf"{re.escape(stem)} (\w+)\.", body)[1]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_the_text_determines_the_answer(task: str, depth: float) -> None:
  for index in range(5):
    sample = HAY.sample(task, 2000, depth, seed=0, index=index)
    assert solve(task, TOKENIZER.decode(sample.tokens)) == sample.answer


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_needle_follows_a_sentence_at_its_depth(depth: float) -> None:
  for index in range(5):
    text = TOKENIZER.decode(HAY.sample("passkey", 2000, depth, seed=0, index=index).tokens)
    body = text.rpartition("\n\n")[0]
    place = body.index(" The pass key number is")
    assert body[place - 1] in ".!?"
    # The longest sentence of the story has 66 characters.
    assert abs(place - depth * len(body)) < 66 + len(" The pass key number is 12345.") * 2.2


def test_tables_grow_with_the_prompt() -> None:
  short, long = (
    TOKENIZER.decode(HAY.sample("key_value", length, 0.5, seed=0, index=0).tokens)
    for length in (1024, 4096)
  )
  assert (short.count("["), long.count("[")) == (8 + 1, 32 + 1)


def test_the_other_variables_are_not_the_answer() -> None:
  puzzle = retrieval.variable_tracking(random.Random(0), 0.2, 1000)
  numbers = {n for one in puzzle.hidden for n in re.findall(r"\d{5}", one.sentence)}
  assert len(puzzle.hidden) == 6
  assert len(numbers) == 2


@pytest.mark.parametrize(
  ("task", "length", "message"),
  [
    ("pass key", 1000, "task is 'pass key'; it must be one of passkey"),
    ("passkey", 9000, "from 1 to .*, the tokens of the longest text"),
    ("passkey", 100, "length leaves -.* tokens"),
  ],
)
def test_impossible_prompts_are_errors(task: str, length: int, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    HAY.sample(task, length, 0.5, seed=0, index=0)


def test_an_empty_haystack_is_an_error() -> None:
  with pytest.raises(ValueError, match="texts is empty"):
    Haystack([], TOKENIZER)


def test_exact_match() -> None:
  samples = [Sample([0], "12"), Sample([0], "34"), Sample([0], "56")]
  result = exact_match([" 12.", " 345", "\n56"], samples)
  assert (result["hits"], result["samples"]) == (2, 3)
  assert result["low"] < result["share"] == 2 / 3 < result["high"]


def test_batched_answers_equal_those_of_single_prompts() -> None:
  own, rng = family(), np.random.default_rng(0)
  prompts = [rng.integers(0, 256, size).tolist() for size in (40, 7, 23)]
  ticks = []
  model = own.model(Variant("v"), 64)
  texts = answer(
    model, TOKENIZER, prompts, new_tokens=3, batch_size=2, tick=lambda: ticks.append(1)
  )
  alone = own.answers(Variant("v"), 64, TOKENIZER, batch_size=1)
  assert texts == [text for prompt in prompts for text in alone([prompt], 3)]
  assert ticks == [1, 1, 1]


def test_jobs_of_a_variant_and_length_share_programs(monkeypatch: pytest.MonkeyPatch) -> None:
  alone = family().answers(Variant("v"), 64, TOKENIZER, batch_size=1)
  made, init = [], ContinuousBatching.__init__

  def count(self: ContinuousBatching, *args: object, **kwargs: object) -> None:
    made.append(kwargs.get("prompt_length"))
    init(self, *args, **kwargs)  # type: ignore[arg-type]

  monkeypatch.setattr(ContinuousBatching, "__init__", count)
  own, rng = family(), np.random.default_rng(0)
  wanted, found = [], []
  for new_tokens, sizes in ((3, (40, 7, 23)), (5, (50,))):
    prompts = [rng.integers(0, 256, size).tolist() for size in sizes]
    answers = own.answers(Variant("v"), 64, TOKENIZER, 2)
    found += answers(prompts, new_tokens)
    wanted += [text for prompt in prompts for text in alone([prompt], new_tokens)]
  assert found == wanted
  assert [length for length in made if length] == [64]
  with pytest.raises(ValueError, match="Prompt 0 has 60 tokens"):
    answers([[1] * 60], 5)
  assert own.answers(Variant("v", {"attention": "dense"}), 64, TOKENIZER, 2) is not answers
