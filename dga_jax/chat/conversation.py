"""Conversations and questions about a document, over one cache that continues.

A `Conversation` appends each turn to the cache of a session. A `DocumentReader` reads a document
once and answers questions about it, each from a copy of the cache after the document.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Self

from dga_jax.chat.session import Session
from dga_jax.chat.template import ChatTemplate, render_marked
from dga_jax.generation.sampling import Sampling
from dga_jax.tokenizer import Tokenizer

_QUESTION = "\ufdd2"  # Stands for the question in a rendered chat template; no text contains it.


class Conversation:
  """A conversation by a chat template.

  Args:
    session: without tokens.
    tokenizer: of the model.
    template: of the model.
    system: the system message; None for the default of the template.

  Attributes:
    messages: of both sides so far.
    rereads: turns for which all tokens were read again, since the template had changed the text of
      an earlier turn, as templates do that drop the reasoning of earlier turns.
  """

  def __init__(
    self,
    session: Session,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    system: str | None = None,
  ) -> None:
    self._session, self._tokenizer, self._template = session, tokenizer, template
    self.messages = [] if system is None else [{"role": "system", "content": system}]
    self.rereads = 0
    self._prompt, self._reply = "", ""  # What the session has read.

  def ask(self, text: str, *, sampling: Sampling, max_new_tokens: int) -> Iterator[str]:
    """Says `text` and yields the pieces of the reply.

    A consumer that stops early ends the reply there. After an interruption before the reply the
    message is not part of the conversation, and the next turn reads all earlier ones again.

    Args:
      text: the user's message.
      sampling: how tokens are sampled.
      max_new_tokens: bound on the tokens of the reply.

    Raises:
      ValueError: the template refuses the messages.
      FloatingPointError: the logits are NaN or infinite.
    """
    messages = [*self.messages, {"role": "user", "content": text}]
    prompt = render_marked(self._template, messages)
    new_tokens = self._new_tokens(prompt)
    try:
      self._session.read(new_tokens)
    except BaseException:  # After Ctrl-C the cache may have a part of the message.
      self._session.clear()
      raise
    new = self._session.generate(
      sampling, max_new_tokens=max_new_tokens, stop_ids=self._tokenizer.stop_ids
    )
    reply = ""
    try:
      for piece in self._tokenizer.decode_stream(new):
        reply += piece
        yield piece
    finally:
      self.messages = [*messages, {"role": "assistant", "content": reply}]
      self._prompt, self._reply = prompt, reply

  def _new_tokens(self, prompt: str) -> list[int]:
    """The tokens of a rendered conversation that the session has not read."""
    encode = self._template.encoder.encode
    if self._session.tokens and self._session.is_intact and prompt.startswith(self._prompt):
      rest = prompt.removeprefix(self._prompt)
      for reply in (self._reply, self._reply.strip()):  # Many templates strip messages.
        known = self._template.encoder.break_up(reply)
        if rest.startswith(known):
          return tokens_after(self._session.tokens, encode, prompt, rest.removeprefix(known))
    self.rereads += bool(self._session.tokens)
    self._session.clear()
    return encode(prompt)


class DocumentReader:
  """A document that a session has read, for many questions.

  With a chat template, document and question are one message of the user, with an empty line in
  between. Without one, the text after the document is "Question: ...", then "Answer:".

  Args:
    session: that has read `before`, or has no tokens.
    tokenizer: of the model.
    template: of the model; None for a model without one.
    before: the text up to the question, from `split_prompt`.
    after: the text after the question.
  """

  def __init__(
    self,
    session: Session,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    before: str,
    after: str,
  ) -> None:
    self._session, self._tokenizer, self._template = session, tokenizer, template
    self.before, self.after = before, after
    if not session.tokens:
      session.read(self._encode(before))

  @classmethod
  def read(
    cls,
    session: Session,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    document: str,
    *,
    system: str | None = None,
  ) -> Self:
    """Reads a document into a session without tokens.

    Args:
      session: without tokens.
      tokenizer: of the model.
      template: of the model; None for a model without one.
      document: the text.
      system: the system message; None for the default of the template.

    Raises:
      ValueError: the document is empty, or the template cannot be used.
    """
    before, after = split_prompt(document, template, system=system)
    return cls(session, tokenizer, template, before=before, after=after)

  def ask(self, question: str, *, sampling: Sampling, max_new_tokens: int) -> Iterator[str]:
    """Yields the pieces of the answer; the next question does not see this one.

    Args:
      question: about the document.
      sampling: how tokens are sampled.
      max_new_tokens: bound on the tokens of the answer.

    Raises:
      ValueError: the question is empty.
      FloatingPointError: the logits are NaN or infinite.
    """
    if not question.strip():
      raise ValueError("A question is empty; ask something about the document.")
    said = question if self._template is None else self._template.encoder.break_up(question)
    new = f"{said}{self.after}"
    new = f"\n\n{new}" if self._template is not None else f"\n\nQuestion: {new}"
    session = self._session.fork()
    session.read(tokens_after(session.tokens, self._encode, self.before + new, new))
    answer = session.generate(
      sampling, max_new_tokens=max_new_tokens, stop_ids=self._tokenizer.stop_ids
    )
    yield from self._tokenizer.decode_stream(answer)

  def _encode(self, text: str) -> list[int]:
    if self._template is not None:
      return self._template.encoder.encode(text)
    return [*self._tokenizer.start_ids, *self._tokenizer.encode(text)]


def split_prompt(
  document: str, template: ChatTemplate | None, *, system: str | None = None
) -> tuple[str, str]:
  """The text up to a question about a document, and the text after the question.

  Raises:
    ValueError: the document is empty, or the template repeats or hides a message.
  """
  document = document.strip()
  if not document:
    raise ValueError("The document is empty; give a text to ask about.")
  if template is None:
    return document, "\nAnswer:"
  messages = [] if system is None else [{"role": "system", "content": system}]
  messages.append({"role": "user", "content": f"{document}\n\n{_QUESTION}"})
  parts = render_marked(template, messages).split(f"\n\n{_QUESTION}")
  if len(parts) != 2:
    raise ValueError(
      f"The chat template writes a message {len(parts) - 1} times; questions about a document need"
      " a template that writes it once. Leave out --chat."
    )
  return parts[0], parts[1]


def tokens_after(
  read: Sequence[int], encode: Callable[[str], list[int]], text: str, new: str
) -> list[int]:
  """The tokens that continue those that were read.

  Args:
    read: token ids.
    encode: text to token ids, with the start tokens of a text.
    text: what was read, followed by `new`.
    new: the text to add. If the tokens of `text` do not begin with those that were read, which a
      model may have sampled in another split, `new` is encoded by itself.
  """
  whole = encode(text)
  if whole[: len(read)] == list(read) and len(whole) > len(read):
    return whole[len(read) :]
  return encode(new)[len(encode("")) :]
