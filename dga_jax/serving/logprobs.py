"""Log probabilities in the shapes of the two endpoints."""

from collections.abc import Sequence
from typing import Any

from dga_jax.generation import TokenLogprobs
from dga_jax.tokenizer import Tokenizer


def chat_logprobs(
  tokenizer: Tokenizer, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> dict[str, Any]:
  """Of a chat completion: one object a token."""

  def entry(token: int, logprob: float) -> dict[str, Any]:
    spelled = tokenizer.token_bytes(token)
    text = spelled.decode(errors="replace")
    return {"token": text, "logprob": logprob, "bytes": list(spelled)}

  content = [
    entry(token, row.logprob) | {"top_logprobs": [entry(*pair) for pair in row.top]}
    for token, row in zip(tokens, logprobs, strict=True)
  ]
  return {"content": content, "refusal": None}


class CompletionLogprobs:
  """Of a completion: parallel lists; text offsets continue from call to call.

  Args:
    tokenizer: of the model.
  """

  def __init__(self, tokenizer: Tokenizer) -> None:
    self._tokenizer, self._offset = tokenizer, 0

  def take(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
    """The lists of the next tokens; a token without log probabilities has null."""
    texts, offsets = [self._text(token) for token in tokens], []
    for text in texts:
      offsets.append(self._offset)
      self._offset += len(text)
    return {
      "tokens": texts,
      "token_logprobs": [None if row is None else row.logprob for row in logprobs],
      "top_logprobs": [
        None if row is None else {self._text(token): logprob for token, logprob in row.top}
        for row in logprobs
      ],
      "text_offset": offsets,
    }

  def _text(self, token: int) -> str:
    """A token's text; bytes that are no whole characters are spelled out, as OpenAI does."""
    spelled = self._tokenizer.token_bytes(token)
    try:
      return spelled.decode()
    except UnicodeDecodeError:
      return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
