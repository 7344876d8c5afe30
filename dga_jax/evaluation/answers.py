"""Greedy answers to prompts, by continuous batching."""

from collections.abc import Callable, Sequence
from typing import Any

from dga_jax.generation import ContinuousBatching, Request, Sampling
from dga_jax.model import Decoder
from dga_jax.tokenizer import Tokenizer

_GREEDY = Sampling(temperature=0.0)


class Answers:
  """Answers of one model to prompts of about equal length, all in the same compiled programs.

  Args:
    model: the decoder.
    tokenizer: of the model.
    length: most tokens of a prompt and its answer; prompts are padded to it.
    batch_size: prompts that run at once.
  """

  def __init__(self, model: Decoder, tokenizer: Tokenizer, *, length: int, batch_size: int) -> None:
    self._tokenizer = tokenizer
    self._batch = ContinuousBatching(
      model,
      [Request([0], 1, _GREEDY)] * batch_size,
      slots=batch_size,
      stop_ids=tokenizer.stop_ids,
      prompt_length=length,
    )

  def __call__(
    self,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    tick: Callable[[], Any] = lambda: None,
  ) -> list[str]:
    """The most likely continuation of each prompt; arguments and errors as for `answer`.

    Raises:
      ValueError: a prompt and its answer exceed `length` tokens.
    """
    self._batch.replace_requests([Request(prompt, new_tokens, _GREEDY) for prompt in prompts])
    return _run(self._batch, self._tokenizer, tick)


def answer(
  model: Decoder,
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  *,
  new_tokens: int,
  batch_size: int,
  tick: Callable[[], Any] = lambda: None,
) -> list[str]:
  """The most likely continuation of each prompt, decoded with the attention kind's cache.

  Args:
    model: the decoder.
    tokenizer: of the model.
    prompts: token ids of each prompt.
    new_tokens: largest number of tokens of an answer; a stop token ends it earlier.
    batch_size: prompts that run at once.
    tick: called when a prompt is answered.

  Raises:
    FloatingPointError: the logits of a prompt are NaN or infinite.
  """
  requests = [Request(prompt, new_tokens, _GREEDY) for prompt in prompts]
  batch = ContinuousBatching(model, requests, slots=batch_size, stop_ids=tokenizer.stop_ids)
  return _run(batch, tokenizer, tick)


def _run(batch: ContinuousBatching, tokenizer: Tokenizer, tick: Callable[[], Any]) -> list[str]:
  for step in batch.steps():
    for emitted in step:
      if emitted.done:
        tick()
  assert batch.result is not None
  batch.result.raise_if_failed()
  return [tokenizer.decode(tokens) for tokens in batch.result.tokens]
