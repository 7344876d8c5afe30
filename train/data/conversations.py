"""Conversations: lines {"messages": [{"role": ..., "content": ...}, ...]}, learnt by their answers.

The loss is on the assistant's turns alone: on their text and on the tokens that end them. A model
with a chat template (config.init_from) trains on its template. Any other model trains on this one,
in which END is the tokenizer's end token and a new line follows every message:

  system: Answer in one word.
  user: What is the capital of France?
  assistant: Paris END
  user: ...

The prompt of such a model is the text up to and including "assistant:".
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from dga_jax.chat.template import ChatTemplate, encode_chat
from dga_jax.tokenizer import Tokenizer

# Begins a document that is the JSON of a conversation. No other document begins like this.
_MARK = "\0messages\0"
_ASSISTANT = "assistant"
_ROLE = re.compile(r"[a-z][a-z_]*")


def to_document(messages: Any) -> str:
  """The document of a conversation, in the form that `Encoder` reads.

  Raises:
    ValueError: no list of messages with a "role" and a "content", or no answer in it.
  """
  if not isinstance(messages, list) or not messages:
    raise ValueError('"messages" must be a list with at least one object.')
  for message in messages:
    if not isinstance(message, dict) or not (
      isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    ):
      raise ValueError(f'a message is {message!r:.80}; it must have the strings "role", "content".')
    if not _ROLE.fullmatch(message["role"]):
      raise ValueError(f"a role is {message['role']!r:.40}; it must be lower-case letters.")
  if all(message["role"] != _ASSISTANT for message in messages):
    raise ValueError(f'there is no message of the role "{_ASSISTANT}", and so nothing to learn.')
  return _MARK + json.dumps(messages, ensure_ascii=False)


def is_conversation(document: str) -> bool:
  """Whether a document comes from `to_document`."""
  return document.startswith(_MARK)


def to_text(document: str) -> str:
  """The text of a document: of a conversation its messages, for the training of a tokenizer."""
  if not is_conversation(document):
    return document
  messages = json.loads(document.removeprefix(_MARK))
  return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Tokens of a document without the end tokens around it, and which of them have a loss.

  Attributes:
    tokens: int32.
    learnt: whether each token is a target.
    end_learnt: whether the end token after the document is a target.
  """

  tokens: Int[np.ndarray, "T"]
  learnt: Bool[np.ndarray, "T"]
  end_learnt: bool


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Documents and conversations to tokens.

  Attributes:
    tokenizer: of the model.
    template: of the model; None for the template of this module.
  """

  tokenizer: Tokenizer
  template: ChatTemplate | None

  def fingerprint(self) -> str:
    """A hash of the template."""
    template = self.template
    text = "plain" if template is None else json.dumps([template.source, template.special_tokens])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

  def encode(self, document: str) -> Encoded:
    """The tokens of a document of text, all learnt, or of a conversation.

    Raises:
      ValueError: the template cannot be applied, or renders a turn in another way once later turns
        follow it.
    """
    if not is_conversation(document):
      tokens_T = np.array(self.tokenizer.encode(document), np.int32)
      return Encoded(tokens_T, np.ones(len(tokens_T), bool), end_learnt=True)
    messages = json.loads(document.removeprefix(_MARK))
    if self.template is None:
      return self._encode_plainly(messages)
    return _encode_by_template(self.template, messages)

  def _encode_plainly(self, messages: Sequence[Mapping[str, str]]) -> Encoded:
    end_id = self.tokenizer.end_id
    tokens: list[int] = []
    learnt: list[bool] = []

    def add(ids: Sequence[int], is_learnt: bool) -> None:
      tokens.extend(ids)
      learnt.extend([is_learnt] * len(ids))

    for message in messages:
      new_line = "\n" if tokens else ""
      add(self.tokenizer.encode(f"{new_line}{message['role']}:"), False)
      is_answer = message["role"] == _ASSISTANT
      add(self.tokenizer.encode(f" {message['content']}"), is_answer)
      if is_answer:
        add([end_id], True)
    if messages[-1]["role"] == _ASSISTANT:  # The end token of the document is its last token.
      del tokens[-1], learnt[-1]
    return Encoded(
      np.array(tokens, np.int32), np.array(learnt, bool), messages[-1]["role"] == _ASSISTANT
    )


def _encode_by_template(template: ChatTemplate, messages: Sequence[Mapping[str, str]]) -> Encoded:
  """The tokens of the whole conversation; an answer is what follows the prompt for it."""
  tokens = encode_chat(template, messages, add_generation_prompt=False)
  learnt_T = np.zeros(len(tokens), bool)
  for index, message in enumerate(messages):
    if message["role"] != _ASSISTANT:
      continue
    with_answer = encode_chat(template, messages[: index + 1], add_generation_prompt=False)
    prompt = encode_chat(template, messages[:index], add_generation_prompt=True) if index else []
    if with_answer[: len(prompt)] != prompt or tokens[: len(with_answer)] != with_answer:
      raise ValueError(
        f"The chat template renders message {index + 1} of a conversation in another way once "
        "later messages follow, so its tokens are not known. Give each line one answer, as the "
        f"last message. The conversation begins {messages[0]['content']!r:.60}."
      )
    learnt_T[len(prompt) : len(with_answer)] = True
  return Encoded(np.array(tokens, np.int32), learnt_T, end_learnt=False)
