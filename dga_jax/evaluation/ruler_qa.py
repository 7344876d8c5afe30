"""RULER's question answering: the documents with the answer among others, from the user's file.

The file is SQuAD's ("data" with "paragraphs" and "qas") or HotpotQA's (a list with "question",
"answer" and "context"). It is not part of this project.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dga_jax.evaluation.ruler import fit, RulerPart, RulerPrompt
from dga_jax.evaluation.scores import contains_answer
from dga_jax.tokenizer import Tokenizer

QA_NEW_TOKENS = 32
_INTRO = "Answer the question from these documents. Give the answer alone."


class Question(NamedTuple):
  """A question of the file.

  Attributes:
    text: the question.
    answers: right answers, each of which suffices.
    documents: indices of its own documents, which are in every prompt.
  """

  text: str
  answers: tuple[str, ...]
  documents: tuple[int, ...]


class QuestionSet(NamedTuple):
  """The content of a file.

  Attributes:
    name: the file's name without its suffix.
    questions: of the file.
    documents: different documents of all questions.
  """

  name: str
  questions: list[Question]
  documents: list[str]

  def sample(self, tokenizer: Tokenizer, length: int, *, seed: int, index: int) -> RulerPrompt:
    """A prompt of at most `length` tokens with its answer: as many documents as fit, shuffled.

    Args:
      tokenizer: of the model.
      length: tokens of the prompt and the answer.
      seed: of the choice and the order of documents.
      index: number of the question.

    Raises:
      ValueError: the question's own documents do not fit.
    """
    question = self.questions[index]
    rng = random.Random(f"{seed} {self.name} {length} {index}")
    own = set(question.documents)
    others = [number for number in range(len(self.documents)) if number not in own]
    rng.shuffle(others)
    order = rng.randrange(2**32)

    def render(units: int) -> str:
      chosen = [*question.documents, *others[: units - len(own)]]
      random.Random(order).shuffle(chosen)
      listed = "\n\n".join(
        f"Document {number}:\n{self.documents[one]}" for number, one in enumerate(chosen, start=1)
      )
      return f"{_INTRO}\n\n{listed}\n\nQuestion: {question.text}\nAnswer:"

    room = length - QA_NEW_TOKENS
    return RulerPrompt(
      fit(tokenizer, render, room, len(own), len(self.documents)), question.answers
    )

  def part(self, tokenizer: Tokenizer, length: int, samples: int, seed: int) -> RulerPart:
    """The prompts of the first `samples` questions; arguments and errors as for `sample`."""
    prompts = [
      self.sample(tokenizer, length, seed=seed, index=index)
      for index in range(min(samples, len(self.questions)))
    ]
    return RulerPart(f"qa {self.name}", prompts, contains_answer, QA_NEW_TOKENS)


def read_question_set(path: str | Path) -> QuestionSet:
  """The questions of a file of SQuAD or HotpotQA; questions without an answer are left out.

  Raises:
    OSError: the file cannot be read.
    ValueError: the file is not in one of the two formats, or it has no question.
  """
  path = Path(path)
  try:
    values = json.loads(path.read_bytes())
    read = _squad(values) if isinstance(values, Mapping) else _hotpot(values)
  except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is not a file of SQuAD or HotpotQA: {error!r}") from error
  numbers: dict[str, int] = {}
  questions = [
    Question(
      text, tuple(answers), tuple(numbers.setdefault(one, len(numbers)) for one in documents)
    )
    for text, answers, documents in read
    if answers
  ]
  if not questions:
    raise ValueError(f"{path} has no question with an answer.")
  return QuestionSet(path.stem, questions, list(numbers))


type _Read = list[tuple[str, list[str], list[str]]]


def _squad(values: Mapping[str, Any]) -> _Read:
  """Questions, answers and the paragraph of each question."""
  return [
    (
      str(question["question"]),
      list(dict.fromkeys(str(answer["text"]) for answer in question["answers"])),
      [str(paragraph["context"])],
    )
    for article in values["data"]
    for paragraph in article["paragraphs"]
    for question in paragraph["qas"]
  ]


def _hotpot(values: Sequence[Mapping[str, Any]]) -> _Read:
  """Questions, answers and all documents of each question."""
  return [
    (
      str(one["question"]),
      [str(one["answer"])],
      list(dict.fromkeys(f"{title}\n{''.join(lines)}" for title, lines in one["context"])),
    )
    for one in values
  ]
