"""Documents with facts: told before they are asked for, in words that no evaluation uses."""

import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dga_jax.evaluation import retrieval, ruler
from train.data.facts import Fact, fact_documents, FACTS

TEXT = "\n\n".join(
  f"Paragraph {number} tells nothing of any importance, at some length." for number in range(400)
)


def documents(seed: int = 0) -> list[str]:
  return list(fact_documents([TEXT, TEXT], characters=9000, facts=20, seed=seed))


def facts(count: int = 40) -> list[tuple[str, Fact]]:
  rng = random.Random(1)
  return [(kind, make(rng)) for kind, make in FACTS.items() for _ in range(count)]


def test_there_are_eight_kinds_and_the_text_tells_every_answer():
  assert len(FACTS) == 8
  for kind, fact in facts():
    assert fact.answer in " ".join(fact.told), kind
    assert fact.answer not in fact.question, kind
    assert fact.asked.startswith(fact.question)
    assert fact.asked.endswith(f"{fact.answer}.")


def test_every_question_follows_its_fact():
  for document in documents():
    paragraphs = document.split("\n\n")
    own = [one for one in paragraphs if not one.startswith("Paragraph")]
    asked = [one for one in own if "?" in one]
    assert len(asked) == 20
    assert len({one.partition("?")[0] for one in asked}) == 20
    told = [(place, one) for place, one in enumerate(paragraphs) if one in own and "?" not in one]
    for question in asked:
      place = paragraphs.index(question)
      # The last words of the answer, without those that begin it.
      answer = question.partition("?")[2].rstrip(".").split()[-1]
      assert any(at < place and answer in one for at, one in told), question


def test_the_text_around_the_facts_is_kept_in_order():
  for document in documents():
    numbers = [int(one) for one in re.findall(r"Paragraph (\d+) tells", document)]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert 0.97 * 9000 < len(document) <= 9000


def test_documents_depend_on_the_seed_alone():
  assert documents() == documents()
  assert documents() != documents(seed=1)
  assert len(set(documents())) == len(documents())


def test_the_words_are_not_those_of_the_evaluation():
  """No sentence of four words of the evaluation's facts, and none of its things."""
  rng = random.Random(0)
  asked = [make(rng, 0.5, 4096) for make in retrieval.TASKS.values()]
  evaluation = [
    f"{one.question} {' '.join(hidden.sentence for hidden in one.hidden)}" for one in asked
  ]
  evaluation += [Path(ruler.__file__).read_text(encoding="utf-8")]
  ours = [f"{' '.join(fact.told)} {fact.asked}" for _, fact in facts()]

  def phrases(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z]+", text.lower())
    return set(zip(*(words[start:] for start in range(4)), strict=False))

  shared = set.union(*map(phrases, evaluation)) & set.union(*map(phrases, ours))
  assert not shared
  words = {word for text in ours for word in re.findall(r"[a-z]+", text.lower())}
  assert not words & {*retrieval.THINGS, "pass", "secret", "code", "variable", "village"}


def test_the_command_writes_a_corpus(tmp_path: Path):
  (tmp_path / "book.txt").write_text(f"{TEXT}\0{TEXT}")
  command = [sys.executable, "-m", "train.make_facts", f"--texts={tmp_path}/*.txt"]
  command += [f"--output={tmp_path}/facts.jsonl", "--documents=3", "--characters=9000"]
  subprocess.run([*command, "--facts=20"], check=True, capture_output=True)
  lines = [json.loads(line) for line in (tmp_path / "facts.jsonl").read_text().splitlines()]
  assert [line["text"] for line in lines] == list(itertools.islice(documents(), 3))
  again = subprocess.run(command, check=False, capture_output=True, text=True)
  assert again.returncode == 1
  assert "which exists" in again.stderr


def test_texts_and_paragraphs_that_fit_no_document():
  assert not list(fact_documents([TEXT], characters=200_000, facts=3))
  long = "word " * 1000
  (document, *_) = fact_documents([f"{long}\n\n{TEXT}"], characters=9000, facts=3)
  assert long not in document
  with pytest.raises(ValueError, match="facts is 100; they take"):
    list(fact_documents([TEXT], characters=9000, facts=100))
