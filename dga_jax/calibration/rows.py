"""Rows of tokens whose losses calibration measures: long texts, and retrieval made by code."""

import dataclasses
import functools
import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Array, Float, Int

from dga_jax.evaluation.retrieval import Haystack, TASKS
from dga_jax.evaluation.texts import Document, token_rows
from dga_jax.tokenizer import Tokenizer

_TARGETS = 64  # Batches have a multiple of this many targets, so that similar rows share a program.


class Batch(NamedTuple):
  """Rows that run together; see `Rows` for the arrays."""

  tokens: Int[Array | np.ndarray, "B L"]
  position: Int[Array | np.ndarray, "B S"]
  target: Int[Array | np.ndarray, "B S"]
  weight: Float[Array | np.ndarray, "B S"]
  question: Int[Array | np.ndarray, "B S"]


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows of L input tokens and the target tokens of each row.

  Attributes:
    tokens: int32 [B, L]; padding to the right of a row's last target has no influence.
    position: int32 [B, S], the input position that predicts each target.
    target: int32 [B, S], token ids.
    weight: float32 [B, S]. The weights of a row sum to 1, those of its questions are equal, and so
      are those of the targets of a question. 0 for padding.
    question: int32 [B, S], the question of the row that each target answers; 0 in texts.
  """

  tokens: Int[np.ndarray, "B L"]
  position: Int[np.ndarray, "B S"]
  target: Int[np.ndarray, "B S"]
  weight: Float[np.ndarray, "B S"]
  question: Int[np.ndarray, "B S"]

  @classmethod
  def from_texts(
    cls,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    length: int,
    rows_per_document: int,
    targets: int | None = None,
  ) -> Self:
    """Pieces of documents; the targets are the last tokens of each row.

    Args:
      documents: long texts.
      tokenizer: of the model.
      length: L, input tokens of a row.
      rows_per_document: largest number of rows from one document.
      targets: S, from 1 to L; None for those of the second half.

    Raises:
      ValueError: no document has `length` tokens, or `targets` is out of range.
    """
    count = length - length // 2 if targets is None else targets
    if not 1 <= count <= length:
      raise ValueError(f"targets is {targets}; it must be from 1 to the row's length, {length}.")
    rows = token_rows(documents, tokenizer, length, rows_per_document)
    position = np.arange(length - count, length, dtype=np.int32)
    return cls(
      tokens=rows[:, :-1],
      position=np.tile(position, (len(rows), 1)),
      target=rows[:, position + 1],
      weight=np.full((len(rows), len(position)), 1 / len(position), np.float32),
      question=np.zeros((len(rows), len(position)), np.int32),
    )

  @classmethod
  def from_puzzles(
    cls,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    length: int,
    *,
    puzzles: Sequence[str],
    samples: int,
    seed: int,
  ) -> Self:
    """Rows of `length` tokens in which facts are hidden, with questions about them and answers.

    A row has the facts and the question of every puzzle. The questions follow the text, each with
    its right answer. The targets are the tokens of the answers.

    Args:
      documents: texts in which facts are hidden.
      tokenizer: of the model.
      length: L, tokens of a row.
      puzzles: distinct names in `retrieval.TASKS`.
      samples: rows. The depths of the facts of each puzzle are evenly spaced over the rows.
      seed: of the texts, the facts and their positions.

    Raises:
      ValueError: an unknown puzzle, or no text has enough tokens.
    """
    hay = _make_haystack(tuple(document.text for document in documents), tokenizer)
    made = [
      _asked(hay, tokenizer, length, puzzles, index, samples, seed) for index in range(samples)
    ]
    most = max(sum(map(len, answers)) for _, answers in made)
    rows = cls(
      tokens=np.zeros((samples, length), np.int32),
      position=np.zeros((samples, most), np.int32),
      target=np.zeros((samples, most), np.int32),
      weight=np.zeros((samples, most), np.float32),
      question=np.zeros((samples, most), np.int32),
    )
    for row, (parts, answers) in enumerate(made):
      tokens, done = [], 0
      for question, (part, answer) in enumerate(zip(parts, answers, strict=True)):
        tokens += [*part, *answer]
        targets = slice(done, done := done + len(answer))
        rows.position[row, targets] = len(tokens) - len(answer) - 1 + np.arange(len(answer))
        rows.target[row, targets] = answer
        rows.weight[row, targets] = 1 / (len(answers) * len(answer))
        rows.question[row, targets] = question
      rows.tokens[row] = tokens[:-1]
    return rows

  def __len__(self) -> int:
    return len(self.tokens)

  @property
  def questions(self) -> int:
    """Questions of a row."""
    return int(self.question.max()) + 1

  @property
  def _arrays(self) -> tuple[np.ndarray, ...]:
    return (self.tokens, self.position, self.target, self.weight, self.question)

  @property
  def digest(self) -> str:
    """A hash of all arrays."""
    digest = hashlib.sha256()
    for array in self._arrays:
      digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]

  def batches(self, size: int) -> Iterator[tuple[int, Batch]]:
    """Batches of equal shape, each with its number of rows; the last row of the last one repeats.

    The targets of a row are padded with targets of weight 0.

    Args:
      size: largest number of rows of a batch.
    """
    size = min(size, len(self))
    for start in range(0, len(self), size):
      index = np.minimum(start + np.arange(size), len(self) - 1)
      tokens, *targets = (array[index] for array in self._arrays)
      padding = ((0, 0), (0, -self.target.shape[1] % _TARGETS))
      yield min(size, len(self) - start), Batch(tokens, *(np.pad(x, padding) for x in targets))


@functools.lru_cache(maxsize=1)
def _make_haystack(texts: tuple[str, ...], tokenizer: Tokenizer) -> Haystack:
  """The tokens of the texts, which the rows of several puzzles share."""
  return Haystack(texts, tokenizer)


def _asked(
  hay: Haystack,
  tokenizer: Tokenizer,
  length: int,
  puzzles: Sequence[str],
  index: int,
  samples: int,
  seed: int,
) -> tuple[list[list[int]], list[list[int]]]:
  """The tokens before each answer, and the answers; together they have `length` + 1 tokens."""
  if unknown := [name for name in puzzles if name not in TASKS]:
    raise ValueError(f"puzzles has {unknown[0]!r}; it must have names of {', '.join(TASKS)}.")
  rng = random.Random(f"{seed} {' '.join(puzzles)} {length} {index} of {samples}")
  depths = [((index + 0.5) / samples + one / len(puzzles)) % 1 for one in range(len(puzzles))]
  made = [TASKS[name](rng, depth, length) for name, depth in zip(puzzles, depths, strict=True)]
  answers = [tokenizer.encode(f" {one.answer}") for one in made]
  further = [tokenizer.encode(f"\n\n{one.question}") for one in made[1:]]
  rest = sum(map(len, answers)) + sum(map(len, further))
  hidden = [fact for one in made for fact in one.hidden]
  text = hay.hide(hidden, made[0].question, length + 1 - rest, rng)
  return [text, *further], answers
