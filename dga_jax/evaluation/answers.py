"""Greedy answers to prompts, through the machinery of generation."""

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
  """The most likely continuation of each prompt, from the attention kind's own cache.

  Args:
    new_tokens: tokens to generate; the end token ends an answer sooner.
    batch_size: prompts under way at once.
    tick: called whenever a prompt is answered.
  """
  greedy = Sampling(temperature=0.0)
  requests = [Request(prompt, new_tokens, greedy) for prompt in prompts]
  batch = ContinuousBatching(model, requests, slots=batch_size, stop_ids=tokenizer.stop_ids)
  for step in batch.steps():
    for emitted in step:
      if emitted.done:
        tick()
  assert batch.result is not None
  return [tokenizer.decode(tokens) for tokens in batch.result.tokens]
