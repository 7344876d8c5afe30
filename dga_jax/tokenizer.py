"""Tokenizers: one class around the `tokenizers` library, stored as one JSON file.

Every tokenizer has an end token, a special token that ends a document. Text never encodes to the
end token or to another special token. A tokenizer made here also puts the end token before a
document's first token, in training and in prompts, so an empty prompt is a prompt of that one
token. An imported tokenizer has the start tokens of its own template.
"""

import codecs
import contextlib
import json
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, Self, TYPE_CHECKING

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dga_jax.files.whole_file import whole_file

if TYPE_CHECKING:
  from dga_jax.chat.template import ChatTemplate

FILE_NAME = "tokenizer.json"
END_TOKEN = "<|end|>"
# What this class adds to the library's JSON:
# {"end": token, "start": [token, ...], "stop": [id, ...]}.
_OUR_KEY = "dga_jax"
# The library lists every id up to the largest when it writes a tokenizer; vocabularies have 2^18.
_MAX_TOKENS = 1 << 22
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_Spelling = Literal["byte_level", "sentencepiece", "words"]


class Tokenizer:
  """Text to token ids and back.

  Args:
    backend: the library's tokenizer. This object takes it over and removes its padding and
      truncation: every text keeps all of its tokens and gets no others.
    end_token: the token that ends a document.
    start_tokens: the tokens before a document's first token.
    stop_ids: ids of further tokens that end a generation. An id may have no text: a model can
      have more embedding rows than its tokenizer has tokens.

  Attributes:
    vocab_size: 1 + the largest token id.
    end_token: the token that ends a document.
    end_id: the id of `end_token`.
    start_ids: ids of the tokens before a document's first token.
    stop_ids: ids of all tokens that end a generation; `end_id` is the first of them.
    chat_template: of the model, set by `dga_jax.load`; None for a model without one.

  Raises:
    ValueError: the vocabulary lacks a token, text encodes to the end token, or this class cannot
      spell out its tokens.
  """

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    *,
    end_token: str = END_TOKEN,
    start_tokens: Sequence[str] = (END_TOKEN,),
    stop_ids: Collection[int] = (),
  ) -> None:
    stops = (backend.id_to_token(token_id) for token_id in stop_ids)
    _mark_special(backend, [end_token, *start_tokens, *filter(None, stops)])
    # A document that spells the end token out holds ordinary characters.
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    self._backend = backend
    ids = backend.get_vocab().values()
    self.vocab_size: int = 1 + max(ids, default=-1)
    if not 0 < self.vocab_size <= _MAX_TOKENS:
      raise ValueError(
        f"The tokenizer has ids up to {self.vocab_size - 1}; it must have a token, and ids below "
        f"{_MAX_TOKENS}."
      )
    if len(set(ids)) < len(ids):
      raise ValueError("The tokenizer gives two tokens the same id.")
    self._added = {i: t.content for i, t in backend.get_added_tokens_decoder().items()}
    self._spelling = _spelling(backend)
    self.end_token = end_token
    self.end_id: int = _special_id(backend, end_token)
    if self._spelling != "words" and self.end_id in self.encode(end_token):
      raise ValueError(
        f"The tokenizer encodes the text {end_token!r} to its end token, which must be a special "
        "token that no text encodes to. Name another end token."
      )
    self.start_ids: tuple[int, ...] = tuple(_special_id(backend, t) for t in start_tokens)
    self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([self.end_id, *stop_ids]))
    self.chat_template: ChatTemplate | None = None
    self._ours = {"end": end_token, "start": list(start_tokens), "stop": list(self.stop_ids)}

  @classmethod
  def imported(
    cls, backend: tokenizers.Tokenizer, end_token: str, *, stop_ids: Collection[int] = ()
  ) -> Self:
    """The tokenizer of another model; the template of `backend` gives the start tokens.

    Args:
      backend: the library's tokenizer.
      end_token: the token that ends a document.
      stop_ids: ids of further tokens that end a generation.

    Raises:
      ValueError: as for the class, or the template puts tokens behind a text.
    """
    before, after = template_tokens(backend)
    if after:
      raise ValueError(f"The tokenizer's template puts {after} behind every text.")
    return cls(backend, end_token=end_token, start_tokens=before, stop_ids=stop_ids)

  @classmethod
  def from_json(cls, text: str) -> Self:
    """The inverse of `to_json`.

    Raises:
      ValueError: the text is damaged or not a tokenizer of this project.
    """
    with _library_errors("this is no tokenizer"):
      values = json.loads(text)
      ours = values.pop(_OUR_KEY, {"end": END_TOKEN, "start": [END_TOKEN]})
      stop_ids = ours.get("stop", [])
      if not all(type(token_id) is int and token_id >= 0 for token_id in stop_ids):
        raise ValueError(f"its stop ids are {stop_ids!r}; they must be integers of at least 0.")
      backend = tokenizers.Tokenizer.from_str(json.dumps(values))
      return cls(backend, end_token=ours["end"], start_tokens=ours["start"], stop_ids=stop_ids)

  @classmethod
  def byte_level(cls) -> Self:
    """One token per byte of UTF-8: id b is byte b, 256 the end token."""
    vocabulary = {_BYTE_TO_CHARACTER[byte]: byte for byte in range(256)}
    return cls(_byte_level_bpe(models.BPE(vocab=vocabulary, merges=[])))

  @classmethod
  def train_bpe(cls, texts: Iterable[str], vocab_size: int, *, progress: bool = False) -> Self:
    """Trains byte-level BPE (Sennrich et al., 2016); the same texts give the same tokenizer.

    Args:
      texts: the training documents.
      vocab_size: bound on the number of tokens; a small corpus gives fewer.
      progress: whether to show progress bars.

    Raises:
      ValueError: vocab_size is below 257, the 256 bytes and the end token.
    """
    if vocab_size < 257:
      raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and the end need at least 257.")
    trainer = trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=[END_TOKEN],
      initial_alphabet=sorted(_CHARACTER_TO_BYTE),
      show_progress=progress,
    )
    backend = _byte_level_bpe(models.BPE())
    backend.train_from_iterator(texts, trainer)
    return cls(backend)

  @classmethod
  def words(cls, vocabulary: Sequence[str]) -> Self:
    """Whitespace-separated words: the end token is id 0, vocabulary[i] is id i + 1."""
    ids = {word: index for index, word in enumerate([END_TOKEN, *vocabulary])}
    backend = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=""))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return cls(backend)

  @classmethod
  def load(cls, directory: str | os.PathLike[str]) -> Self:
    """Reads what `save` wrote.

    Raises:
      FileNotFoundError: the directory holds no tokenizer.
      ValueError: the file is damaged or no tokenizer of this project.
    """
    path = pathlib.Path(directory) / FILE_NAME
    if not path.is_file():
      raise FileNotFoundError(f"There is no tokenizer at {path}.")
    try:
      return cls.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
      raise ValueError(f"{path} is not a tokenizer of this project: {error}") from error

  def save(self, directory: str | os.PathLike[str]) -> pathlib.Path:
    """Writes directory/tokenizer.json, whole or not at all, and returns its path."""
    path = pathlib.Path(directory) / FILE_NAME
    with whole_file(path) as partial:
      partial.write_text(self.to_json(), encoding="utf-8")
    return path

  def to_json(self) -> str:
    """The file's content: everything that defines the tokenizer."""
    return json.dumps(json.loads(self.to_plain_json()) | {_OUR_KEY: self._ours})

  def to_plain_json(self) -> str:
    """The `tokenizers` library's own JSON, which other programs read."""
    return self._backend.to_str()

  def encode(self, text: str) -> list[int]:
    """Token ids of a text, without end token.

    Raises:
      ValueError: a word that a vocabulary of words lacks, a character that has no token, or a
        lone surrogate. A byte-level tokenizer encodes every other text.
    """
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of many texts, on all cores."""
    if self._spelling == "words":
      for word in " ".join(texts).split():
        if word == self.end_token or self._backend.token_to_id(word) is None:
          raise ValueError(f"The text holds {word!r}, which is no word of this vocabulary.")
    return encode_texts(self._backend, texts)

  def decode(self, ids: Iterable[int]) -> str:
    """The text of token ids; bytes that are no UTF-8 become U+FFFD, the end token nothing.

    SentencePiece vocabularies put a space before a text, and it comes back here: what continues a
    prompt has to keep it.
    """
    return "".join(self.decode_stream(ids))

  def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
    """The pieces of `decode(ids)`, one per id as it comes, then one for the rest.

    The bytes of a character that is not yet whole are held back until it is.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token_id in ids:
      yield utf8.decode(self.token_bytes(token_id))
    yield utf8.decode(b"", final=True)

  def token_bytes(self, token_id: int) -> bytes:
    """The bytes of a token: none for the end token, those of U+FFFD for an unknown id."""
    if token_id == self.end_id:
      return b""
    token = self._backend.id_to_token(token_id)
    if token is None:
      return "\N{REPLACEMENT CHARACTER}".encode()
    if token_id in self._added:
      return token.encode()
    if self._spelling == "byte_level":
      if not _CHARACTER_TO_BYTE.keys() >= set(token):
        return token.encode()  # Not spelled in bytes, like an added token.
      return bytes(_CHARACTER_TO_BYTE[character] for character in token)
    if self._spelling == "sentencepiece":
      byte = _BYTE_TOKEN.fullmatch(token)
      return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
    return f"{token} ".encode()


def template_tokens(backend: tokenizers.Tokenizer) -> tuple[list[str], list[str]]:
  """The tokens that a tokenizer's template puts before and behind a text.

  Args:
    backend: the library's tokenizer; its padding and truncation are removed.

  Raises:
    ValueError: the vocabulary has no token for any of the probe texts.
  """
  backend.no_padding()
  backend.no_truncation()
  for probe in ("a", "the", "0", " ", "."):
    encoding = backend.encode(probe, add_special_tokens=True)
    plain = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    if plain:
      return encoding.tokens[: plain[0]], encoding.tokens[plain[-1] + 1 :]
  raise ValueError("The tokenizer encodes the texts 'a', 'the', '0', ' ' and '.' to no tokens.")


def encode_texts(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
  """Token ids of many texts, without the tokens of the tokenizer's template.

  Args:
    backend: the library's tokenizer.
    texts: to encode, on all cores.

  Raises:
    ValueError: a text has a lone surrogate, or a character that has no token.
  """
  with _library_errors("The text cannot be encoded"):
    for text in texts:
      text.encode()  # The library's error for a lone surrogate does not name the character.
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
  return [encoding.ids for encoding in encodings]


def is_panic(error: BaseException) -> bool:
  """Whether an error is a panic of Rust code, which is a BaseException and no Exception."""
  return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def _library_errors(problem: str) -> Iterator[None]:
  """Turns every error of the `tokenizers` library into a ValueError that begins with `problem`."""
  try:
    yield
  except BaseException as error:
    if not (isinstance(error, Exception) or is_panic(error)):
      raise
    raise ValueError(f"{problem}: {error}") from error


def _mark_special(backend: tokenizers.Tokenizer, contents: Collection[str]) -> None:
  """Makes added tokens special where the files do not say so; transformers does the same."""
  added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
  for content in contents:
    token = added.get(content)
    if token is not None and not token.special:
      token.special = True
      backend.add_special_tokens([token])


def _special_id(backend: tokenizers.Tokenizer, token: str) -> int:
  token_id = backend.token_to_id(token)
  if token_id is None:
    raise ValueError(f"The tokenizer lacks the token {token!r}, which ends or begins a document.")
  return int(token_id)


def _spelling(backend: tokenizers.Tokenizer) -> _Spelling:
  """How the vocabulary writes bytes and spaces; the decoder of `backend` tells."""
  decoder: Any = json.loads(backend.to_str())["decoder"]
  steps = [step for step in (decoder or {}).get("decoders", [decoder]) if step]
  kinds = {step["type"] for step in steps}
  if kinds == {"ByteLevel"}:
    return "byte_level"
  if kinds & {"ByteFallback", "Metaspace"} and all(map(_is_sentencepiece_step, steps)):
    return "sentencepiece"
  if decoder is None and isinstance(backend.model, models.WordLevel):
    return "words"
  raise ValueError(
    f"The tokenizer has the decoder {decoder!r}; it must be a byte-level one, one of "
    "SentencePiece's, or a list of words without a decoder."
  )


def _is_sentencepiece_step(step: dict[str, Any]) -> bool:
  """Whether a decoder writes "▁" as a space, bytes as bytes, or joins and strips the pieces."""
  if step["type"] == "Replace":
    return (step["pattern"], step["content"]) == ({"String": "▁"}, " ")
  if step["type"] == "Metaspace":
    return bool(step["replacement"] == "▁")
  if step["type"] == "Strip":
    return bool(step["content"] == " ")
  return step["type"] in ("ByteFallback", "Fuse")


def _byte_level_bpe(model: models.BPE) -> tokenizers.Tokenizer:
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens([END_TOKEN])
  return backend


def _byte_characters() -> Iterator[str]:
  """The characters by which the library writes bytes 0 to 255 in a byte-level vocabulary.

  Visible Latin-1 characters stand for themselves; the other bytes take U+0100 onwards, in order.
  """
  hidden = 0
  for character in map(chr, range(256)):
    if character.isprintable() and not character.isspace():
      yield character
    else:
      yield chr(256 + hidden)
      hidden += 1


_BYTE_TO_CHARACTER = tuple(_byte_characters())
_CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(_BYTE_TO_CHARACTER)}
