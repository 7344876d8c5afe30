"""Greedy answers to prompts, batch by batch, through the machinery of generation."""

from collections.abc import Callable, Sequence
from typing import Any

from dga_jax.generation import generate
from dga_jax.model import Decoder
from dga_jax.sampling import Sampling
from dga_jax.tokenizer import Tokenizer


def answer(
  model: Decoder,
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  *,
  new_tokens: int,
  batch_size: int,
  tick: Callable[[int], Any] = lambda done: None,
) -> list[str]:
  """The most likely continuation of each prompt, from the attention kind's own cache.

  Prompts of similar length share a batch; a batch that is not full repeats its last prompt, so
  that all batches of one length run the same program.

  Args:
    new_tokens: tokens to generate; the end token ends an answer sooner.
    batch_size: prompts that run together.
    tick: called with the number of prompts answered, after every batch.
  """
  order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
  texts = [""] * len(prompts)
  for start in range(0, len(order), batch_size):
    rows = order[start : start + batch_size]
    batch = [prompts[row] for row in rows]
    batch += [batch[-1]] * (batch_size - len(batch))
    result = generate(
      model,
      batch,
      max_new_tokens=new_tokens,
      sampling=Sampling(temperature=0.0),
      end_id=tokenizer.end_id,
    )
    for row, tokens in zip(rows, result.tokens, strict=False):
      texts[row] = tokenizer.decode(tokens)
    tick(len(rows))
  return texts
