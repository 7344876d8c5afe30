"""Scores equal hand-computed examples and the packages that LongBench uses."""

import json
from pathlib import Path

import pytest

from dga_jax.evaluation import scores

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/longbench_scores.json").read_text())
CLASSES = ["Color", "Color name", "City", "Other city"]


@pytest.mark.parametrize(
  ("hits", "trials", "low", "high"),
  # Computed by hand: the upper bound of 0 of n is z²/(n + z²); 5 of 10 is symmetric.
  [(0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (5, 10, 0.236593, 0.763407)],
)
def test_wilson_interval(hits: int, trials: int, low: float, high: float) -> None:
  assert scores.wilson_interval(hits, trials) == pytest.approx((low, high), abs=2e-6)


@pytest.mark.parametrize(("hits", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_of_invalid_counts_is_an_error(hits: int, trials: int) -> None:
  with pytest.raises(ValueError, match=f"hits is {hits} of trials={trials}"):
    scores.wilson_interval(hits, trials)


@pytest.mark.parametrize(
  ("prediction", "right"),
  [
    (" 48213.\n\nThe", True),
    ("48213", True),
    (" 482130", False),
    (" the 48213", False),
    ("", False),
  ],
)
def test_first_word(prediction: str, right: bool) -> None:
  assert scores.first_word_match(prediction, "48213") is right


def test_normal_form() -> None:
  assert scores.normalised("The  Cat's, a\tdog; AN owl.") == "cats dog owl"


@pytest.mark.parametrize(
  ("prediction", "right"),
  [
    ("It was Wilhelm  Röntgen.", True),
    ("the Röntgen", True),
    ("Curie\nWilhelm Röntgen", False),
    ("", False),
  ],
)
def test_answer_in_the_first_line(prediction: str, right: bool) -> None:
  assert scores.contains_answer(prediction, ["A. Becquerel", "Röntgen"]) is right


@pytest.mark.parametrize(
  ("prediction", "reference", "expected"),
  [
    ("the red house", "a red house", 1.0),
    ("red red house", "red barn", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
    ("blue", "red", 0.0),
    ("", "red", 0.0),
  ],
)
def test_f1(prediction: str, reference: str, expected: float) -> None:
  assert scores.qa_f1(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(("prediction", "reference", "expected"), GOLDEN["rouge_l"])
def test_rouge_equals_the_package(prediction: str, reference: str, expected: float) -> None:
  assert scores.rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_rouge_of_nothing() -> None:
  assert scores.rouge_l("", "a summary") == scores.rouge_l("...", "a summary") == 0.0


@pytest.mark.parametrize(("prediction", "reference", "expected"), GOLDEN["code"])
def test_code_similarity_equals_the_package(
  prediction: str, reference: str, expected: float
) -> None:
  assert scores.code_similarity(prediction, reference) == expected


def test_code_is_the_first_line_without_comment_or_fence() -> None:
  answer = "\n```python\n# comment\n// other\nreturn x\nreturn y"
  assert scores.code_similarity(answer, "return x") == 1.0


@pytest.mark.parametrize(
  ("prediction", "reference", "expected"),
  [
    ("Type: City", "City", 1.0),
    ("City or Color", "City", 1 / 2),
    ("Color name", "Color name", 1.0),  # The label "Color" is part of the reference.
    ("Color name", "Color", 1 / 2),
    ("nothing", "City", 0.0),
    ("Color", "City", 0.0),
  ],
)
def test_classification(prediction: str, reference: str, expected: float) -> None:
  assert scores.classification(prediction, reference, CLASSES) == pytest.approx(expected)


def test_count_and_retrieval() -> None:
  assert scores.count("5 or 7, so 5", "5") == pytest.approx(2 / 3)
  assert scores.count("none", "5") == 0.0
  assert scores.retrieval("Paragraph 12, not 3", "Paragraph 12") == 1 / 2
  with pytest.raises(ValueError, match="must name a paragraph"):
    scores.retrieval("1", "third")
