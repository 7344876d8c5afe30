"""Byte-level tokenizers: one class around the `tokenizers` library, kept as one JSON file.

Every tokenizer has one special token, the end of a document. Text never encodes to it. In
training it also stands before a document's first token, so an empty prompt is a prompt of that
one token.
"""

import codecs
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

FILE_NAME = "tokenizer.json"
END_TOKEN = "<|end|>"


class Tokenizer:
  """Text to token ids and back.

  Attributes:
    vocab_size: number of tokens, the end token included.
    end_id: id of the token that ends a document.
  """

  def __init__(self, backend: tokenizers.Tokenizer) -> None:
    end_id = backend.token_to_id(END_TOKEN)
    if end_id is None:
      raise ValueError(f"The tokenizer lacks the token {END_TOKEN!r}, which ends a document.")
    # A document that spells the end token out holds seven ordinary characters.
    backend.encode_special_tokens = True
    self._backend = backend
    self._byte_level = isinstance(backend.decoder, decoders.ByteLevel)
    self.end_id: int = end_id
    self.vocab_size: int = backend.get_vocab_size()

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
      return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:  # The library raises plain Exception on JSON that it cannot read.
      raise ValueError(f"{path} is not a tokenizer of this project: {error}") from error

  def save(self, directory: str | os.PathLike[str]) -> pathlib.Path:
    """Writes directory/tokenizer.json, whole or not at all, and returns its path."""
    path = pathlib.Path(directory) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
      partial.write_text(self.to_json(), encoding="utf-8")
      partial.replace(path)
    finally:
      partial.unlink(missing_ok=True)
    return path

  def to_json(self) -> str:
    """The file's content: everything that defines the tokenizer."""
    return self._backend.to_str()

  def encode(self, text: str) -> list[int]:
    """Token ids of a text, without end token.

    Raises:
      ValueError: a word that a vocabulary of words lacks; byte-level tokenizers take every text.
    """
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of many texts, on all cores."""
    if not self._byte_level:
      for word in " ".join(texts).split():
        if self._backend.token_to_id(word) is None:
          raise ValueError(f"The text holds {word!r}, which is no word of this vocabulary.")
    encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]

  def decode(self, ids: Iterable[int]) -> str:
    """The text of token ids; bytes that are no UTF-8 become U+FFFD, the end token nothing."""
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
    """The bytes that a token stands for: none for the end token, U+FFFD's for an unknown id."""
    if token_id == self.end_id:
      return b""
    token = self._backend.id_to_token(token_id)
    if token is None:
      return "\N{REPLACEMENT CHARACTER}".encode()
    if self._byte_level:
      return bytes(_CHARACTER_TO_BYTE[character] for character in token)
    return f"{token} ".encode()


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
