"""Tokens to text, piece by piece: whole characters, up to a stop text."""

import codecs
from collections.abc import Sequence

from dga_jax.tokenizer import Tokenizer


class TextStream:
  """Decodes an answer token by token.

  The bytes of an unfinished character are held back. A text that may be the beginning of a stop
  text is held back until it is known.

  Args:
    tokenizer: of the model.
    stops: texts that end the answer and are not part of it.

  Attributes:
    stopped: whether the answer contains a stop text.
    whole_tokens: with a stop text, the number of tokens before it, without one that has a part of
      it.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
    self._tokenizer, self._stops = tokenizer, stops
    self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    self._held, self._characters = "", 0
    self._ends: list[int | None] = []  # Characters after each token; None inside a character.
    self.stopped, self.whole_tokens = False, 0

  def add(self, token: int) -> str:
    """The text that is certain with one more token."""
    new = self._utf8.decode(self._tokenizer.token_bytes(token))
    unfinished, _ = self._utf8.getstate()
    self._ends.append(None if unfinished else self._characters + len(new))
    return self._advance(new)

  def finish(self) -> str:
    """The text that was held back, after the last token."""
    text = self._advance(self._utf8.decode(b"", final=True))
    held, self._held = self._held, ""
    return text if self.stopped else text + held

  def _advance(self, new: str) -> str:
    if self.stopped:
      return ""
    text = self._held + new
    self._characters += len(new)
    ends = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
    if ends:
      self.stopped, self._held = True, ""
      begin = self._characters - len(text) + min(ends)
      before = [i for i, end in enumerate(self._ends, 1) if end is not None and end <= begin]
      self.whole_tokens = max(before, default=0)
      return text[: min(ends)]
    held = max((_overlap(text, stop) for stop in self._stops), default=0)
    self._held = text[len(text) - held :]
    return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
  """Characters at the end of a text that are the beginning of a stop text."""
  for size in range(min(len(text), len(stop) - 1), 0, -1):
    if stop.startswith(text[-size:]):
      return size
  return 0
