"""A model that the server offers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dga_jax.chat.template import ChatTemplate, encode_chat
from dga_jax.generation import Engine
from dga_jax.serving.errors import APIError, invalid
from dga_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ServedModel:
  """A model with its engine.

  Attributes:
    name: in the interface.
    engine: runs it.
    tokenizer: of the model.
    template: of its conversations; None if it has none.
    created: seconds since 1970.
    trained_length: tokens of the longest context of the training; None if it is unknown.
  """

  name: str
  engine: Engine
  tokenizer: Tokenizer
  template: ChatTemplate | None
  created: int
  trained_length: int | None = None

  def encode_text(self, text: str) -> list[int]:
    """The tokens of a prompt, with the model's start tokens.

    Raises:
      APIError: the text cannot be encoded.
    """
    try:
      return [*self.tokenizer.start_ids, *self.tokenizer.encode(text)]
    except ValueError as error:
      raise invalid("prompt", f"prompt: {error}") from error

  def check_ids(self, ids: Sequence[int]) -> None:
    """Checks the token ids of a prompt, at least one.

    Raises:
      APIError: the model has no such token.
    """
    V = self.engine.config.vocab_size
    for one in (min(ids), max(ids)):
      if not 0 <= one < V:
        raise invalid(
          "prompt", f"prompt has the token id {one!r:.40}; this model has ids from 0 to {V - 1}."
        )

  def encode_messages(self, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """The tokens of a conversation, and the positions where later requests may continue.

    These are the end of the system messages, and the end of the last message before the beginning
    of the answer.

    Raises:
      APIError: the model has no chat template, or the template refuses the messages.
    """
    if self.template is None:
      raise APIError(
        400,
        f"The model {self.name!r} has no chat template: use /v1/completions.",
        param="messages",
        code="no_chat_template",
      )
    try:
      tokens = encode_chat(self.template, messages)
    except ValueError as error:
      raise invalid("messages", f"messages: {error}") from error
    system = [message for message in messages if message["role"] == "system"]
    ends = [self._shared(tokens, part) for part in (system, messages) if part]
    return tokens, [end for end in ends if end]

  def _shared(self, tokens: list[int], messages: Sequence[dict[str, Any]]) -> int:
    """Tokens at the beginning that messages without a following answer have in common."""
    assert self.template is not None
    try:
      part = encode_chat(self.template, messages, add_generation_prompt=False)
    except ValueError:  # Templates may refuse a conversation of system messages.
      return 0
    pairs = enumerate(zip(tokens, part, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(part)))
