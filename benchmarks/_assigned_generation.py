"""Greedy decoding in the program of the calibration, whose argument is the assignment of heads.

A decoder with head budgets compiles a prefill and a decoding step for every set. Here one compiled
forward pass over rows of a fixed length serves every set. The settings of head budgets are causal
and give the same function whole and token by token, so a pass over a row with guessed new tokens
tells which guesses greedy decoding takes, and the token after them. The tokens that a pass predicts
after the first wrong guess are the guesses of the next pass (Jacobi decoding, Santilli et al.,
arXiv 2305.10427).
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from dga_jax.calibration.program import AssignedDecoder
from dga_jax.calibration.rows import Batch

_NEW_TOKENS = 64  # Programs predict a multiple of this many new tokens.

type IsDone = Callable[[list[int]], bool]


class _Row:
  """A prompt, the new tokens that greedy decoding takes, and guesses of the tokens after them."""

  def __init__(self, index: int, prompt: Sequence[int], guess: Sequence[int]) -> None:
    self.index, self.prompt = index, list(prompt)
    self.new: list[int] = []
    self._guess = list(guess)

  def tokens(self, length: int) -> Int[np.ndarray, "L"]:
    """Prompt, new tokens and guesses, padded with 0."""
    tokens = np.array([*self.prompt, *self.new, *self._guess], np.int32)
    return np.pad(tokens, (0, length - len(tokens)))

  def accept(self, predicted_S: Int[np.ndarray, "S"], ends: Callable[[list[int]], bool]) -> bool:
    """Takes the predictions whose earlier tokens are all right; whether the row has ended.

    Args:
      predicted_S: the prediction of each new token from the tokens before it.
      ends: whether new tokens are the last.
    """
    guess = iter(self._guess)
    while True:
      token = int(predicted_S[len(self.new)])
      self.new.append(token)
      if ends(self.new) or len(self.new) == len(predicted_S):
        return True
      if next(guess, None) != token:
        break
    self._guess = predicted_S[len(self.new) :].tolist()
    return False


def continue_prompts(
  decoder: AssignedDecoder,
  assignment: Int[np.ndarray, "K N"],
  prompts: Sequence[Sequence[int]],
  guesses: Sequence[Sequence[int]],
  is_done: Sequence[IsDone],
  *,
  new_tokens: int,
  shape: tuple[int, int],
) -> list[list[int]]:
  """The most likely continuations of prompts, as greedy decoding gives them.

  Args:
    decoder: whose causal settings the assignment counts.
    assignment: the setting of each KV head.
    prompts: token ids.
    guesses: for each prompt, tokens that are likely to follow; any tokens give the same result.
    is_done: for each prompt, whether its new tokens are enough. It is asked after each new token.
    new_tokens: most new tokens of a prompt.
    shape: rows and tokens of a batch.

  Raises:
    ValueError: a prompt and its new tokens exceed the tokens of a row.
  """
  size, length = shape
  longest = max(map(len, prompts)) + new_tokens
  if longest > length:
    raise ValueError(f"shape has rows of {length} tokens; a prompt and its answer take {longest}.")
  waiting = [
    _Row(index, prompt, guess[:new_tokens])
    for index, (prompt, guess) in enumerate(zip(prompts, guesses, strict=True))
  ][::-1]
  rows: list[_Row] = []
  done: dict[int, list[int]] = {}
  while waiting or rows:
    while waiting and len(rows) < size:
      rows.append(waiting.pop())
    predicted_BxS = _predict(decoder, assignment, rows, new_tokens, shape)
    left = []
    for row, predicted_S in zip(rows, predicted_BxS, strict=False):
      if row.accept(predicted_S, is_done[row.index]):
        done[row.index] = row.new
      else:
        left.append(row)
    rows = left
  return [done[index] for index in range(len(prompts))]


def _predict(
  decoder: AssignedDecoder,
  assignment: Int[np.ndarray, "K N"],
  rows: Sequence[_Row],
  new_tokens: int,
  shape: tuple[int, int],
) -> Int[np.ndarray, "B S"]:
  """The prediction of each new token of each row; the last row repeats up to the batch's size."""
  size, length = shape
  filled = [*rows, *[rows[-1]] * (size - len(rows))]
  tokens_BxL = np.stack([row.tokens(length) for row in filled])
  first_B = np.array([len(row.prompt) - 1 for row in filled], np.int32)
  padded = new_tokens + -new_tokens % _NEW_TOKENS
  position_BxS = np.minimum(first_B[:, None] + np.arange(padded, dtype=np.int32), length - 1)
  zero = np.zeros_like(position_BxS)
  batch = Batch(tokens_BxL, position_BxS, zero, zero.astype(np.float32), zero)
  end = decoder.run_layers(decoder.embed(tokens_BxL), assignment, 0, len(assignment))
  return np.asarray(decoder.predict(decoder.target_states(end, batch)))[:, :new_tokens]
