"""Rows: which tokens are targets, and how rows are batched."""

import numpy as np
import pytest

from dga_jax.calibration.rows import Rows
from tests.dga_jax.calibration import small
from tests.dga_jax.evaluation import tiny


def targets_of(rows: Rows, row: int) -> list[int]:
  """The targets as the tokens that follow the positions, where both are inputs."""
  kept = rows.weight[row] > 0
  assert rows.weight[row].sum() == pytest.approx(1)
  return rows.target[row, kept].tolist()


def test_the_targets_of_a_text_are_its_second_half() -> None:
  rows = Rows.from_texts(small.DOCUMENTS, tiny.TOKENIZER, 64, 2)
  assert len(rows) == 6
  tokens = [*tiny.TOKENIZER.start_ids, *tiny.TOKENIZER.encode(small.DOCUMENTS[0].text)]
  assert rows.tokens[0].tolist() == tokens[:64]
  assert targets_of(rows, 0) == tokens[33:65]
  assert rows.position[0].tolist() == list(range(32, 64))


def test_the_last_tokens_alone_are_targets() -> None:
  half, last = (
    Rows.from_texts(small.DOCUMENTS, tiny.TOKENIZER, 64, 2, targets) for targets in (None, 5)
  )
  assert last.tokens.tolist() == half.tokens.tolist()
  assert targets_of(last, 1) == targets_of(half, 1)[-5:]
  assert last.position[0].tolist() == [59, 60, 61, 62, 63]
  with pytest.raises(ValueError, match="targets is 65; it must be from 1 to the row's length, 64"):
    Rows.from_texts(small.DOCUMENTS, tiny.TOKENIZER, 64, 2, 65)


def test_targets_of_batches_are_padded_without_weight() -> None:
  rows = Rows.from_texts(small.DOCUMENTS, tiny.TOKENIZER, 64, 2, 5)
  ((_, batch),) = rows.batches(8)
  assert batch.target.shape == (6, 64)
  np.testing.assert_array_equal(batch.target[:, :5], rows.target)
  assert not batch.weight[:, 5:].any()
  assert not batch.question[:, 5:].any()


@pytest.mark.parametrize("puzzle", ["passkey", "key_value", "needle"])
def test_the_targets_of_a_puzzle_are_its_answer(puzzle: str) -> None:
  rows = Rows.from_puzzles(
    small.DOCUMENTS, tiny.TOKENIZER, 512, puzzles=[puzzle], samples=3, seed=1
  )
  assert rows.tokens.shape == (3, 512)
  for row in range(3):
    answer = tiny.TOKENIZER.decode(targets_of(rows, row))
    kept = rows.weight[row] > 0
    position = rows.position[row, kept]
    assert np.diff(position).tolist() == [1] * (len(position) - 1)
    # Each target is the next input; the last answer token is no input.
    assert rows.tokens[row, position[1:]].tolist() == rows.target[row, kept].tolist()[:-1]
    prompt = tiny.TOKENIZER.decode(rows.tokens[row, : position[0] + 1].tolist())
    assert answer.startswith(" ")
    assert answer.strip() in prompt
    assert not rows.tokens[row, position[-1] + 1 :].any()


def test_prompts_depend_on_the_seed_alone() -> None:
  first, same, other = (
    Rows.from_puzzles(
      small.DOCUMENTS, tiny.TOKENIZER, 256, puzzles=["passkey"], samples=2, seed=seed
    )
    for seed in (1, 1, 2)
  )
  assert first.digest == same.digest
  assert first.digest != other.digest


def test_batches_have_one_shape_and_every_row_once() -> None:
  rows = Rows.from_texts(small.DOCUMENTS, tiny.TOKENIZER, 64, 1)
  batches = list(rows.batches(2))
  assert [count for count, _ in batches] == [2, 1]
  assert {batch.tokens.shape for _, batch in batches} == {(2, 64)}
  seen = np.concatenate([batch.tokens[:count] for count, batch in batches])
  np.testing.assert_array_equal(seen, rows.tokens)
  assert [batch.tokens.shape for _, batch in rows.batches(100)] == [(3, 64)]
