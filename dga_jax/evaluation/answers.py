"""Greedy answers to prompts, by continuous batching."""

from collections.abc import Callable, Sequence
from typing import Any

from dga_jax.generation import ContinuousBatching, Request, Sampling
from dga_jax.model import Decoder
from dga_jax.tokenizer import Tokenizer


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
  greedy = Sampling(temperature=0.0)
  requests = [Request(prompt, new_tokens, greedy) for prompt in prompts]
  batch = ContinuousBatching(model, requests, slots=batch_size, stop_ids=tokenizer.stop_ids)
  for step in batch.steps():
    for emitted in step:
      if emitted.done:
        tick()
  assert batch.result is not None
  batch.result.raise_if_failed()
  return [tokenizer.decode(tokens) for tokens in batch.result.tokens]
