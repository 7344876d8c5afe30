"""The engine's record of a request, and of tokens that the device computes."""

import dataclasses
from collections.abc import Callable

import numpy as np

from dga_jax.generation.requests import Emitted, FinishReason, Request, TokenLogprobs
from dga_jax.generation.sampling import NOT_FINITE, Sampled
from dga_jax.model.decoder import DecoderCache

Deliver = Callable[[Emitted], None]


@dataclasses.dataclass(eq=False)
class Task:
  """A request and its progress.

  Attributes:
    number: of the request; negative for `Engine.read_ahead`.
    request: the request.
    deliver: takes what the request emits, on the engine's thread.
    scheduled: tokens of the continuation that are sampled or dispatched.
    tokens: the tokens of the continuation that are delivered.
    cached_tokens: tokens of the prompt whose cache was kept.
    prompt_scores: see `PromptReader.take`; until they are delivered.
    row: a copy of the slot's cache after the last token, for which `KeptCaches.reserve` has
      reserved memory; None without one.
    finish: why the request has ended.
  """

  number: int
  request: Request
  deliver: Deliver | None
  scheduled: int = 0
  tokens: list[int] = dataclasses.field(default_factory=list)
  cached_tokens: int = 0
  prompt_scores: list[tuple[Sampled, int]] = dataclasses.field(default_factory=list)
  row: DecoderCache | None = None
  finish: FinishReason | None = None

  def tokens_in_cache(self) -> np.ndarray:
    """int32, the prompt and the answer without its last sampled token, which ended it.

    A stop token is the last sampled token and not part of `tokens`.
    """
    answer = self.tokens if self.finish == "stop" else self.tokens[:-1]
    return np.asarray([*self.request.prompt, *answer], np.int32)

  def take_prompt_logprobs(self) -> list[TokenLogprobs] | None:
    """Log probabilities of all tokens of the prompt but the first, once; else None."""
    scores, self.prompt_scores = self.prompt_scores, []
    if not scores:
      return None
    pieces = [[np.asarray(x)[:count] for x in piece[1:]] for piece, count in scores]
    # No token follows the last one.
    arrays = [np.concatenate(parts)[:-1] for parts in zip(*pieces, strict=True)]
    return _logprobs(self.request.sampling.top_logprobs, arrays)

  def until_end(self, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
    """The tokens before the end of the request, and why it ends; None if it continues."""
    for count, token in enumerate(tokens):
      if token == NOT_FINITE:
        return tokens[:count], "not_finite"
      if token in self.request.stop_ids:
        return tokens[:count], "stop"
    is_full = len(self.tokens) + len(tokens) == self.request.max_new_tokens
    return tokens, "length" if is_full else None


@dataclasses.dataclass(frozen=True)
class Dispatched:
  """Tokens that the device computes, [T, B], and the request that owns each column."""

  owner: dict[int, Task]
  new: Sampled

  def read(self) -> list[tuple[Task, list[int], FinishReason | None, list[TokenLogprobs]]]:
    """Waits for the tokens.

    Returns:
      For every request that has not ended: its new tokens without a stop token, why it ends with
      them, and their log probabilities.
    """
    owner = {column: task for column, task in self.owner.items() if task.finish is None}
    token_TxB = np.asarray(self.new.token)
    wants = any(task.request.sampling.top_logprobs is not None for task in owner.values())
    logprobs = [np.asarray(x) for x in self.new[1:]] if wants else []
    results = []
    for column, task in owner.items():
      left = task.request.max_new_tokens - len(task.tokens)
      tokens, finish = task.until_end(token_TxB[:left, column].tolist())
      arrays = [x[: len(tokens), column] for x in logprobs]
      results.append((task, tokens, finish, _logprobs(task.request.sampling.top_logprobs, arrays)))
    return results


def _logprobs(count_top: int | None, arrays: list[np.ndarray]) -> list[TokenLogprobs]:
  """Of some tokens; `arrays` are the log probabilities of `Sampled`, cut to these tokens."""
  if count_top is None:
    return []
  rows = zip(*(x.tolist() for x in arrays), strict=True)
  return [
    TokenLogprobs(own, list(zip(ids[:count_top], values[:count_top], strict=True)))
    for own, ids, values in rows
  ]
