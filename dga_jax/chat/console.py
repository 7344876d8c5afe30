"""Conversations in a terminal, and questions about a document, for the `generate` command.

Replies are printed to stdout. Prompts for input, figures and notes are printed to stderr.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import get_args

from dga_jax.cache_choice import with_smaller_cache
from dga_jax.chat.cache_file import load_cache, save_cache, stored_attention
from dga_jax.chat.conversation import Conversation, DocumentReader
from dga_jax.chat.session import Session
from dga_jax.chat.template import ChatTemplate
from dga_jax.choices import AttentionName
from dga_jax.generation.console import warn_about_long
from dga_jax.generation.sampling import Sampling
from dga_jax.loading import Loaded, with_attention
from dga_jax.model import Decoder
from dga_jax.tokenizer import Tokenizer

_ROOM = 1024  # Tokens of questions and answers for which the choice of a cache leaves room.


def converse(
  loaded: Loaded, sampling: Sampling, *, max_new_tokens: int, system: str | None
) -> None:
  """Reads messages from stdin, one a line, and prints the replies, until the input ends.

  Ctrl-C ends a reply; Ctrl-C or Ctrl-D at the prompt ends the conversation.

  Args:
    loaded: a model with a chat template.
    sampling: how tokens are sampled.
    max_new_tokens: bound on the tokens of a reply.
    system: the system message; None for the default of the template.

  Raises:
    ValueError: the model has no chat template, or its attention kind cannot continue a cache.
    FloatingPointError: the logits are NaN or infinite.
  """
  session = Session(loaded.model)
  template = require_template(loaded.tokenizer)
  talk = Conversation(session, loaded.tokenizer, template, system=system)
  for line in _messages():
    before = talk.rereads
    pieces = talk.ask(line, sampling=sampling, max_new_tokens=max_new_tokens)
    try:
      _print_pieces(pieces)
    except KeyboardInterrupt:
      pieces.close()  # type: ignore[attr-defined]  # a generator
      print()
    if talk.rereads > before:
      _note("the template changed an earlier turn, so the whole conversation was read again")
    _note(f"{len(session.tokens)} tokens, cache {session.cache_bytes / 1e6:.3g} MB")


def answer_questions(
  loaded: Loaded,
  questions: Sequence[str],
  sampling: Sampling,
  *,
  max_new_tokens: int,
  chat: bool,
  system: str | None = None,
  document: str | None = None,
  save_path: str | None = None,
  load_path: str | None = None,
  attention_is_chosen: bool = False,
  json_lines: bool = False,
) -> None:
  """Reads a document or its stored cache, and prints the answer to each question.

  Args:
    loaded: a model.
    questions: about the document; each one is answered without the others.
    sampling: how tokens are sampled.
    max_new_tokens: bound on the tokens of an answer.
    chat: whether document and question are a message in the model's chat template.
    system: the system message; None for the default of the template.
    document: the text; None with `load_path`.
    save_path: file for the cache of the document; None to keep no cache.
    load_path: file of a stored cache; None with `document`.
    attention_is_chosen: see `with_smaller_cache`.
    json_lines: whether answers are printed as JSON objects with "question" and "answer".

  Raises:
    ValueError: the model, the document or the file does not fit; the message names the remedy.
    OSError: a file cannot be read or written.
    FloatingPointError: the logits are NaN or infinite.
  """
  tokenizer = loaded.tokenizer
  template = require_template(tokenizer) if chat else None
  begin = time.perf_counter()
  if load_path is not None:
    session = Session(loaded.model if attention_is_chosen else _model_of_file(loaded, load_path))
    reader = load_cache(load_path, session, tokenizer, template)
  else:
    assert document is not None
    length = len(tokenizer.encode(document))
    warn_about_long([length], loaded.trained_length)
    loaded = with_smaller_cache(loaded, length + _ROOM, is_chosen=attention_is_chosen)
    session = Session(loaded.model)
    reader = DocumentReader.read(session, tokenizer, template, document, system=system)
  _note(
    f"{len(session.tokens)} tokens of context in {time.perf_counter() - begin:.1f} s, cache"
    f" {session.cache_bytes / 1e6:.3g} MB, attention {session.model.config.attention}"
  )
  if save_path is not None:
    size = save_cache(save_path, session, reader, tokenizer, template)
    _note(f"{save_path} has the cache: {size / 1e6:.3g} MB")
  for i, question in enumerate(questions):
    begin = time.perf_counter()
    pieces = reader.ask(question, sampling=sampling.with_offset(i), max_new_tokens=max_new_tokens)
    if json_lines:
      print(json.dumps({"question": question, "answer": "".join(pieces)}, ensure_ascii=False))
    else:
      print(f"> {question}")
      _print_pieces(pieces)
    _note(f"answered in {time.perf_counter() - begin:.1f} s")


def _model_of_file(loaded: Loaded, path: str) -> Decoder:
  """The model with the attention kind of a stored cache; budgets of heads are given by flags."""
  attention = stored_attention(path)
  kinds = {kind: kind for kind in get_args(AttentionName) if kind != "head_budgets"}
  return with_attention(loaded.model, kinds[attention]) if attention in kinds else loaded.model


def require_template(tokenizer: Tokenizer) -> ChatTemplate:
  """The chat template of a tokenizer; raises ValueError if it has none."""
  if tokenizer.chat_template is None:
    raise ValueError(
      "The model has no chat template: it was not tuned on conversations, or was imported without"
      " its template. Continue a text with --prompt instead."
    )
  return tokenizer.chat_template


def _messages() -> Iterator[str]:
  """The lines of stdin that are not blank; a terminal shows a prompt."""
  is_terminal = sys.stdin.isatty()
  if is_terminal:
    _note("Ctrl-C ends a reply, Ctrl-D the conversation")
  while True:
    try:
      if is_terminal:
        print("> ", end="", file=sys.stderr, flush=True)
      line = sys.stdin.readline()
    except KeyboardInterrupt:
      return
    if not line:
      return
    if line.strip():
      yield line.rstrip("\r\n")


def _print_pieces(pieces: Iterator[str]) -> None:
  for piece in pieces:
    print(piece, end="", flush=True)
  print(flush=True)


def _note(text: str) -> None:
  print(f"[{text}]", file=sys.stderr)
