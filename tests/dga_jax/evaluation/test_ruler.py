"""RULER's prompts: the answers follow from the text by each task's rule; lengths; the command."""

import collections
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dga_jax.evaluation import report
from dga_jax.evaluation.jobs import run_jobs
from dga_jax.evaluation.results import Results
from dga_jax.evaluation.ruler import fit, ruler_recall, RULER_TASKS, RulerTexts, zipf_counts
from dga_jax.evaluation.ruler_qa import QA_NEW_TOKENS, read_question_set
from dga_jax.evaluation.task_jobs import RulerSettings, TaskJobs
from dga_jax.evaluation.texts import Document
from dga_jax.evaluation.variants import Variant
from tests.dga_jax.evaluation.tiny import family, STORY, TOKENIZER

ROOT = Path(__file__).parents[3]
# Words of four letters: no letter follows twice, so that all differ.
WORDS = " ".join(f"{a}{b}{c}{d}" for a in "bdfg" for b in "aeiou" for c in "klmn" for d in "aeiou")
TEXTS = RulerTexts([STORY * 60, STORY * 30 + WORDS], TOKENIZER)
LENGTH = 4500  # Of bytes, which are the tokens here.


def solve(task: str, text: str) -> set[str]:
  """The answers, worked out from the text by the task's rule."""
  body, _, question = text.rpartition("\n\n")
  if task == "variable_tracking":
    (value,) = set(re.findall(r"\d{7}", question))
    names, sources = set(), [value]
    while sources:
      found = set(re.findall(rf"Variable (\w+) takes (?:the value of )?{sources.pop()}\.", body))
      sources += found - names
      names |= found
    return names
  if task == "common_words":
    counts = collections.Counter(re.findall(r"\d+\. (\w+)", body))
    return {word for word, _ in counts.most_common(10)}
  if task == "frequent_words":
    counts = collections.Counter(body.rpartition("\n\n")[2].split())
    assert counts.most_common(4)[2][1] > counts.most_common(4)[3][1]
    return {word for word, _ in counts.most_common(3)}
  asked = set(re.findall(r"the (\w+ \w+)(?=, the|\?| does)", question)) - {"text give"}
  pairs = re.findall(r"One code of the (\w+ \w+) is (\d{7})\.", body)
  return {value for key, value in pairs if key in asked}


EXPECTED = {
  "single": 1,
  "multi_key": 1,
  "multi_value": 4,
  "multi_query": 4,
  "variable_tracking": 5,
  "common_words": 10,
  "frequent_words": 3,
}


@pytest.mark.parametrize("task", RULER_TASKS)
def test_the_answers_follow_from_the_text(task: str) -> None:
  for index in range(3):
    prompt = TEXTS.sample(task, LENGTH, seed=0, index=index)
    assert len(prompt.answers) == len(set(prompt.answers)) == EXPECTED[task]
    assert solve(task, TOKENIZER.decode(prompt.tokens)) == set(prompt.answers)


@pytest.mark.parametrize("task", RULER_TASKS)
def test_prompts_fill_their_length_and_repeat(task: str) -> None:
  prompt = TEXTS.sample(task, LENGTH, seed=1, index=0)
  room = LENGTH - RULER_TASKS[task].new_tokens
  # A unit of the word tasks is at most three list items.
  slack = 60 if task in ("common_words", "frequent_words") else 0
  assert room - slack <= len(prompt.tokens) <= room
  assert prompt.tokens[0] == TOKENIZER.end_id
  assert TEXTS.sample(task, LENGTH, seed=1, index=0) == prompt
  assert TEXTS.sample(task, LENGTH, seed=1, index=1) != prompt
  assert TEXTS.sample(task, LENGTH, seed=2, index=0) != prompt


@pytest.mark.parametrize(("task", "needles", "keys"), [
  ("single", 1, 1), ("multi_key", 4, 4), ("multi_value", 4, 1), ("multi_query", 4, 4),
])  # fmt: skip
def test_the_needles(task: str, needles: int, keys: int) -> None:
  text = TOKENIZER.decode(TEXTS.sample(task, LENGTH, seed=0, index=0).tokens)
  found = re.findall(r"One code of the (\w+ \w+) is (\d{7})\.", text)
  assert (len(found), len({key for key, _ in found})) == (needles, keys)


def test_a_chain_is_in_the_order_of_the_text() -> None:
  prompt = TEXTS.sample("variable_tracking", LENGTH, seed=0, index=0)
  text = TOKENIZER.decode(prompt.tokens)
  places = [text.index(f"Variable {name} takes") for name in prompt.answers]
  assert places == sorted(places)


@pytest.mark.parametrize(("length", "often", "seldom"), [(2000, 10, 1), (LENGTH, 30, 3)])
def test_common_words_have_ten_times_the_count(length: int, often: int, seldom: int) -> None:
  prompt = TEXTS.sample("common_words", length, seed=0, index=0)
  text = TOKENIZER.decode(prompt.tokens)
  counts = collections.Counter(re.findall(r"\d+\. (\w+)", text))
  assert {counts[word] for word in prompt.answers} == {often}
  assert {count for word, count in counts.items() if word not in prompt.answers} == {seldom}


def test_zipf_counts() -> None:
  counts = zipf_counts(1645)  # 1645/ζ(2) = 1000.04
  assert counts[:4] == [1000, 250, 111, 62]
  assert len(counts) == 31
  assert min(counts) == 1


def test_recall_counts_whole_words() -> None:
  assert ruler_recall(" 123, 456 and 789.", ["123", "789"]) == 1
  assert ruler_recall("Apple pears", ["apple", "pear"]) == 0.5
  assert ruler_recall("1234", ["123"]) == 0


def test_fit_takes_as_many_units_as_fit() -> None:
  def render(units: int) -> str:
    return "x" * 7 * units

  for length in range(15, 80):
    tokens = fit(TOKENIZER, render, length, 2, 9)
    assert len(tokens) == 1 + 7 * min((length - 1) // 7, 9)
  with pytest.raises(
    ValueError, match="length leaves 14 tokens for a prompt; the smallest takes 15"
  ):
    fit(TOKENIZER, render, 14, 2, 9)


def test_prompts_that_cannot_be_made() -> None:
  with pytest.raises(ValueError, match="task is 'needle'; it must be one of single, multi_key"):
    TEXTS.sample("needle", LENGTH, seed=0, index=0)
  with pytest.raises(ValueError, match=r"the smallest takes \d+: raise --lengths"):
    TEXTS.sample("common_words", 500, seed=0, index=0)
  few = RulerTexts(["seven words." * 9], TOKENIZER)
  with pytest.raises(ValueError, match="the documents have 2 different words"):
    few.sample("common_words", LENGTH, seed=0, index=0)


def paragraph(number: int) -> str:
  return f"Paragraph {number} says that the box holds {1000 + number} stones."


SQUAD = {
  "data": [
    {
      "paragraphs": [
        {
          "context": paragraph(number),
          "qas": [
            {"question": f"How many stones does box {number} hold?",
             "answers": [{"text": str(1000 + number)}, {"text": str(1000 + number)}]},
            {"question": "Who knows?", "answers": []},
          ],
        }
        for number in range(20)
      ]
    }
  ]
}  # fmt: skip
HOTPOT = [
  {
    "question": f"Which box is number {number}?",
    "answer": f"box {number}",
    "context": [[f"Title {one}", ["First. ", f"It is {one}."]] for one in (number, number + 1)],
  }
  for number in range(9)
]


def test_squad(tmp_path: Path) -> None:
  path = tmp_path / "squad.json"
  path.write_text(json.dumps(SQUAD))
  asked = read_question_set(path)
  assert (asked.name, len(asked.questions), len(asked.documents)) == ("squad", 20, 20)
  for index in range(20):
    prompt = asked.sample(TOKENIZER, 700, seed=0, index=index)
    text = TOKENIZER.decode(prompt.tokens)
    assert paragraph(index) in text
    assert prompt.answers == (str(1000 + index),)
    assert text.endswith(f"Question: How many stones does box {index} hold?\nAnswer:")
    assert 700 - QA_NEW_TOKENS - 80 < len(prompt.tokens) <= 700 - QA_NEW_TOKENS
  # All documents fit.
  whole = TOKENIZER.decode(asked.sample(TOKENIZER, 9000, seed=0, index=3).tokens)
  assert sorted(re.findall(r"Paragraph (\d+)", whole)) == sorted(map(str, range(20)))
  with pytest.raises(ValueError, match="length leaves 118 tokens"):
    asked.sample(TOKENIZER, 150, seed=0, index=0)


def test_the_place_of_the_answer_varies(tmp_path: Path) -> None:
  path = tmp_path / "squad.json"
  path.write_text(json.dumps(SQUAD))
  asked = read_question_set(path)
  places = set()
  for index in range(10):
    text = TOKENIZER.decode(asked.sample(TOKENIZER, 900, seed=0, index=index).tokens)
    places.add(re.findall(r"Paragraph (\d+)", text).index(str(index)))
  assert len(places) > 3


def test_hotpot(tmp_path: Path) -> None:
  path = tmp_path / "hotpot.json"
  path.write_text(json.dumps(HOTPOT))
  asked = read_question_set(path)
  assert (len(asked.questions), len(asked.documents)) == (9, 10)
  prompt = asked.sample(TOKENIZER, 400, seed=0, index=4)
  text = TOKENIZER.decode(prompt.tokens)
  assert "Title 4\nFirst. It is 4." in text
  assert "Title 5\nFirst. It is 5." in text
  assert prompt.answers == ("box 4",)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "is not a file of SQuAD or HotpotQA: JSONDecodeError"),
    ('{"data": [{}]}', "is not a file of SQuAD or HotpotQA: KeyError"),
    ('[{"question": 1}]', "is not a file of SQuAD or HotpotQA: KeyError"),
    ('{"data": []}', "has no question with an answer"),
  ],
)
def test_other_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
  path = tmp_path / "other.json"
  path.write_text(content)
  with pytest.raises(ValueError, match=message):
    read_question_set(path)


def test_jobs_and_their_table(tmp_path: Path) -> None:
  path = tmp_path / "hotpot.json"
  path.write_text(json.dumps(HOTPOT))
  variants = [Variant("dense", {"attention": "dense"})]
  jobs = TaskJobs(family(), TOKENIZER, variants, [700])
  asked = list(
    jobs.ruler([Document("a", STORY * 9)], ["single"], path, RulerSettings(2, batch_size=2))
  )
  results = Results(tmp_path / "r.jsonl")
  assert run_jobs(asked, results, origin="o") == 0
  assert [result["part"] for result in results.all()] == ["single", "qa hotpot"]
  assert all(result["samples"] == 2 for result in results.all())
  (table,) = report.write("ruler", results.all(), tmp_path)
  assert "| single | dense | 700 | 700 (100.0%) | 0.0 ± 0.0 | 2 |" in table.read_text()


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--documents=a", "--ruler_tasks=singel"], "--ruler_tasks has 'singel'; it takes single"),
    (["--documents=a", "--ruler_tasks="], "--task=ruler needs --ruler_questions"),
    ([], "--task=ruler needs --documents"),
  ],
)
def test_flags(flags: list[str], message: str) -> None:
  command = [sys.executable, "-m", "dga_jax.evaluate", "--workdir=x", "--task=ruler", *flags]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 1
  assert message in done.stdout + done.stderr
  assert "Traceback" not in done.stderr
