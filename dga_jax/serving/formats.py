"""The JSON objects of completions and chat completions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dga_jax.generation import TokenLogprobs
from dga_jax.serving.answers import Delta
from dga_jax.serving.logprobs import chat_logprobs, CompletionLogprobs
from dga_jax.tokenizer import Tokenizer


class ChatFormat:
  """Of /v1/chat/completions.

  Args:
    tokenizer: of the model.
    choices: answers.
    logprobs: whether the request has asked for log probabilities.
  """

  object_name, chunk_name = "chat.completion", "chat.completion.chunk"
  id_prefix = "chatcmpl"

  def __init__(self, tokenizer: Tokenizer, choices: int, logprobs: bool) -> None:
    self._tokenizer, self._choices, self._logprobs = tokenizer, choices, logprobs

  def first_choices(self) -> list[dict[str, Any]]:
    """The role, before any text."""
    delta = {"role": "assistant", "content": ""}
    return [
      {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}
      for i in range(self._choices)
    ]

  def chunk_choice(self, delta: Delta) -> dict[str, Any]:
    """New text."""
    return {
      "index": delta.index,
      "delta": {"content": delta.text} if delta.text else {},
      "logprobs": self._logprobs_of([delta]),
      "finish_reason": delta.finish,
    }

  def whole_choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
    """The message."""
    content = "".join(delta.text for delta in deltas)
    return {
      "index": index,
      "message": {"role": "assistant", "content": content, "refusal": None},
      "logprobs": self._logprobs_of(deltas),
      "finish_reason": deltas[-1].finish,
    }

  def _logprobs_of(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
    if not self._logprobs:
      return None
    tokens = [token for delta in deltas for token in delta.tokens]
    return chat_logprobs(self._tokenizer, tokens, [row for d in deltas for row in d.logprobs])


@dataclasses.dataclass(frozen=True)
class Echo:
  """The prompt that an answer repeats; empty for an answer without it.

  Attributes:
    text: of the prompt.
    tokens: of the prompt, without the start tokens that the server has added.
  """

  text: str
  tokens: Sequence[int]


class CompletionFormat:
  """Of /v1/completions.

  Args:
    tokenizer: of the model.
    echoes: of each choice.
    logprobs: whether the request has asked for log probabilities. The log probabilities of an
      echoed prompt arrive with the first tokens of its answer.
  """

  object_name = chunk_name = "text_completion"
  id_prefix = "cmpl"

  def __init__(self, tokenizer: Tokenizer, echoes: Sequence[Echo], logprobs: bool) -> None:
    self._echoes = echoes
    self._logprobs = [CompletionLogprobs(tokenizer) if logprobs else None for _ in echoes]

  def first_choices(self) -> list[dict[str, Any]]:
    """The prompts that are echoed without log probabilities."""
    return [
      {"index": i, "text": echo.text, "logprobs": None, "finish_reason": None}
      for i, (echo, logprobs) in enumerate(zip(self._echoes, self._logprobs, strict=True))
      if echo.text and logprobs is None
    ]

  def chunk_choice(self, delta: Delta) -> dict[str, Any]:
    """New text."""
    echo = "" if delta.prompt_logprobs is None else self._echoes[delta.index].text
    return {
      "index": delta.index,
      "text": echo + delta.text,
      "logprobs": self._logprobs_of(delta.index, [delta]),
      "finish_reason": delta.finish,
    }

  def whole_choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
    """The text."""
    return {
      "index": index,
      "text": self._echoes[index].text + "".join(delta.text for delta in deltas),
      "logprobs": self._logprobs_of(index, deltas),
      "finish_reason": deltas[-1].finish,
    }

  def _logprobs_of(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any] | None:
    logprobs = self._logprobs[index]
    if logprobs is None:
      return None
    tokens: list[int] = []
    rows: list[TokenLogprobs | None] = []
    for delta in deltas:
      if delta.prompt_logprobs is not None:
        echoed = self._echoes[index].tokens
        # The first token of a prompt has no log probability.
        of_prompt = [None, *delta.prompt_logprobs]
        tokens += echoed
        rows += of_prompt[len(of_prompt) - len(echoed) :]
      tokens += delta.tokens
      rows += delta.logprobs
    return logprobs.take(tokens, rows)
