"""Rows of tokens whose losses calibration measures: long texts, and retrieval made by code."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Array, Float, Int

from dga_jax.evaluation.retrieval import Haystack
from dga_jax.evaluation.texts import Document, token_rows
from dga_jax.tokenizer import Tokenizer


class Batch(NamedTuple):
  """Rows that run together; see `Rows` for the arrays."""

  tokens: Int[Array | np.ndarray, "B L"]
  position: Int[Array | np.ndarray, "B S"]
  target: Int[Array | np.ndarray, "B S"]
  weight: Float[Array | np.ndarray, "B S"]


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows of L input tokens and the target tokens of each row.

  Attributes:
    tokens: int32 [B, L]; padding to the right of a row's last target has no influence.
    position: int32 [B, S], the input position that predicts each target.
    target: int32 [B, S], token ids.
    weight: float32 [B, S], 1/(targets of the row), and 0 for padding.
  """

  tokens: Int[np.ndarray, "B L"]
  position: Int[np.ndarray, "B S"]
  target: Int[np.ndarray, "B S"]
  weight: Float[np.ndarray, "B S"]

  @classmethod
  def from_texts(
    cls, documents: Sequence[Document], tokenizer: Tokenizer, length: int, rows_per_document: int
  ) -> Self:
    """Pieces of documents; the targets are the tokens of the second half of each row.

    Raises:
      ValueError: no document has `length` tokens.
    """
    rows = token_rows(documents, tokenizer, length, rows_per_document)
    position = np.arange(length // 2, length, dtype=np.int32)
    return cls(
      tokens=rows[:, :-1],
      position=np.tile(position, (len(rows), 1)),
      target=rows[:, position + 1],
      weight=np.full((len(rows), len(position)), 1 / len(position), np.float32),
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
    """Retrieval prompts of `length` tokens with their answers; the targets are the answer's tokens.

    Args:
      documents: texts in which facts are hidden.
      tokenizer: of the model.
      length: L, tokens of a row.
      puzzles: names in `retrieval.TASKS`.
      samples: prompts of each puzzle, with facts at evenly spaced depths.
      seed: of the texts, the facts and their positions.

    Raises:
      ValueError: an unknown puzzle, or no text has enough tokens.
    """
    hay = Haystack([document.text for document in documents], tokenizer)
    prompts = [
      hay.sample(puzzle, length, (index + 0.5) / samples, seed=seed, index=index)
      for puzzle in puzzles
      for index in range(samples)
    ]
    answers = [tokenizer.encode(f" {prompt.answer}") for prompt in prompts]
    most = max(map(len, answers))
    rows = cls(
      tokens=np.zeros((len(prompts), length), np.int32),
      position=np.zeros((len(prompts), most), np.int32),
      target=np.zeros((len(prompts), most), np.int32),
      weight=np.zeros((len(prompts), most), np.float32),
    )
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
      inputs, count = [*prompt.tokens, *answer[:-1]], len(answer)
      rows.tokens[row, : len(inputs)] = inputs
      rows.position[row, :count] = len(inputs) - count + np.arange(count)
      rows.target[row, :count] = answer
      rows.weight[row, :count] = 1 / count
    return rows

  def __len__(self) -> int:
    return len(self.tokens)

  @property
  def digest(self) -> str:
    """A hash of all arrays."""
    digest = hashlib.sha256()
    for array in (self.tokens, self.position, self.target, self.weight):
      digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]

  def batches(self, size: int) -> Iterator[tuple[int, Batch]]:
    """Batches of equal shape, each with its number of rows; the last row of the last one repeats.

    Args:
      size: largest number of rows of a batch.
    """
    size = min(size, len(self))
    for start in range(0, len(self), size):
      index = np.minimum(start + np.arange(size), len(self) - 1)
      arrays = (self.tokens, self.position, self.target, self.weight)
      yield min(size, len(self) - start), Batch(*(array[index] for array in arrays))
