"""Text in, text out: one prompt or one conversation at a time."""

from collections.abc import Mapping, Sequence
from typing import Any

from dga_jax.chat.template import encode_chat
from dga_jax.generation.continuous_batching import ContinuousBatching, Request
from dga_jax.generation.sampling import Sampling
from dga_jax.model import Decoder
from dga_jax.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]]
"""A text to continue, or the messages of a conversation."""


def generate(
  model: Decoder,
  tokenizer: Tokenizer,
  prompt: Prompt,
  *,
  max_new_tokens: int = 256,
  sampling: Sampling | None = None,
) -> str:
  """Continues a text, or answers the last message of a conversation.

      model, tokenizer = dga_jax.load("Llama-3.2-1B-Instruct")
      messages = [{"role": "user", "content": "What is the capital of France?"}]
      print(dga_jax.generate(model, tokenizer, messages, max_new_tokens=50))

  Each call compiles the programs for its length. For many prompts use
  `dga_jax.generation.ContinuousBatching`, for many turns `dga_jax.chat.conversation.Conversation`.

  Args:
    model: from `dga_jax.load`.
    tokenizer: from the same call. Its stop ids end the text.
    prompt: a text, or messages with "role" and "content", which the model's chat template turns
      into a text.
    max_new_tokens: bound on the tokens of the continuation.
    sampling: how tokens are sampled; None for `Sampling()`, and `Sampling(temperature=0)` takes the
      most likely tokens.

  Returns:
    The continuation without the prompt.

  Raises:
    ValueError: the model has no chat template, the prompt is empty or not a conversation, or
      max_new_tokens is below 1.
    FloatingPointError: the logits are NaN or infinite.
  """
  tokens = prompt_tokens(tokenizer, prompt)
  request = Request(tokens, max_new_tokens, sampling or Sampling())
  batch = ContinuousBatching(model, [request], slots=1, stop_ids=tokenizer.stop_ids)
  result = batch.run()
  result.raise_if_failed()
  return tokenizer.decode(result.tokens[0])


def prompt_tokens(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
  """The tokens of a text, after the start tokens, or of messages.

  Raises:
    ValueError: as for `generate`.
  """
  if isinstance(prompt, str):
    return [*tokenizer.start_ids, *tokenizer.encode(prompt)]
  if tokenizer.chat_template is None:
    raise ValueError(
      "The model has no chat template, which turns messages into a text: it was not tuned on"
      " conversations, or was imported without its template. Give a text to continue."
    )
  return encode_chat(tokenizer.chat_template, prompt)
