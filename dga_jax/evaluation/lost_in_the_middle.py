"""Question answering over many documents (Liu et al., Lost in the Middle, arXiv 2307.03172).

A file is one of the authors' .jsonl files, which may be compressed, with "question", "answers" and
"ctxs": documents with "title", "text" and "isgold". The files are not part of this project.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dga_jax.evaluation.scores import contains_answer, wilson_interval
from dga_jax.evaluation.texts import read_jsonl

NEW_TOKENS = 100
_TASK = "Give a short answer to the question, from these search results alone."


@dataclasses.dataclass(frozen=True)
class Question:
  """One example.

  Attributes:
    prompt: documents, then the question.
    answers: the right answers.
    gold: index of the document with the answer; None if no document is marked.
    documents: number of documents.
  """

  prompt: str
  answers: list[str]
  gold: int | None
  documents: int


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
  """The examples of a file.

  Args:
    path: the file.
    limit: largest number of examples; None for all.

  Raises:
    OSError: the file cannot be read.
    ValueError: a line is not in the authors' format, or there is no example.
  """
  questions: list[Question] = []
  for number, values in read_jsonl(Path(path)):
    if limit is not None and len(questions) == limit:
      break
    try:
      questions.append(_question(values))
    except (AttributeError, KeyError, TypeError) as error:
      raise ValueError(f"{path}, line {number}, is not a question: {error!r}") from error
  if not questions:
    raise ValueError(f"{path} has no question.")
  return questions


def score(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, Any]:
  """Exact match by the position of the document with the answer, and over all questions."""
  hits: dict[int | None, list[bool]] = defaultdict(list)
  for question, prediction in zip(questions, predictions, strict=True):
    hits[question.gold].append(contains_answer(prediction, question.answers))
  by_place = [
    {"gold": place, **_share(hits[place])}
    for place in sorted(hits, key=lambda place: (place is None, place))
  ]
  return {"by_place": by_place, **_share([hit for some in hits.values() for hit in some])}


def _question(values: Mapping[str, Any]) -> Question:
  documents = values["ctxs"]
  gold = [place for place, document in enumerate(documents) if document.get("isgold")]
  listed = "\n".join(
    f"[{number}] {document['title']}\n{document['text']}"
    for number, document in enumerate(documents, start=1)
  )
  return Question(
    prompt=f"{_TASK}\n\n{listed}\n\nQuestion: {values['question']}\nAnswer:",
    answers=list(values["answers"]),
    gold=gold[0] if gold else None,
    documents=len(documents),
  )


def _share(hits: Sequence[bool]) -> dict[str, Any]:
  low, high = wilson_interval(sum(hits), len(hits))
  return {
    "hits": sum(hits),
    "samples": len(hits),
    "share": sum(hits) / len(hits),
    "low": low,
    "high": high,
  }
