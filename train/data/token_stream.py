"""Tokenized documents: one long stream of ids in array_record blocks, with random access."""

import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jaxtyping import Bool, Int
from tensorflow_datasets.core.data_sources.array_record import ArrayRecordDataSource
from tqdm import tqdm

from dga_jax.tokenizer import Tokenizer
from train.data.conversations import Encoded, Encoder
from train.data.files import Split
from train.data.local_text import LocalText
from train.data.tfds_builder import build, LocalBuilder

# Tokens of a record: a row of some thousand tokens is read from a few records.
_BLOCK = 4096
# Characters that are encoded at a time: some two books for each core. A core encodes whole
# documents, so the time of a batch is at least that of its longest document.
_ENCODE_CHARACTERS = 1_000_000 * max(16, os.cpu_count() or 1)


class TokenStream:
  """The tokens of a split's documents: end, document, end, document, ..., end.

  The token after each position is the one to predict there, up to and including the end token of
  each document: end token and document are the inputs, document and end token the targets.

  Args:
    blocks: the stream in blocks of `_BLOCK` tokens; for conversations also with the arrays "ends",
      the tokens that end a document, and "learnt", the tokens that have a loss.
    end_id: the end token. Without "ends" each of them ends a document.

  Attributes:
    ends_N: int64 positions of the end tokens, one more than documents; document i has its inputs
      in ends_N[i]:ends_N[i + 1] and its targets one position further.
  """

  def __init__(self, blocks: Sequence[Mapping[str, Any]], end_id: int) -> None:
    self._blocks = blocks
    ends = [
      np.flatnonzero(block["ends"] if "ends" in block else block["tokens"] == end_id)
      + index * _BLOCK
      for index, block in enumerate(blocks)
    ]
    self.ends_N = np.concatenate(ends)

  def read(self, start: int, stop: int) -> Int[np.ndarray, "T"]:
    """The int32 tokens at positions start, ..., stop - 1."""
    return self._read("tokens", start, stop)

  def learnt(self, start: int, stop: int) -> Bool[np.ndarray, "T"]:
    """Which of the tokens at positions start, ..., stop - 1 have a loss as targets."""
    if "learnt" not in self._blocks[0]:
      return np.ones(stop - start, bool)
    return self._read("learnt", start, stop).astype(bool)

  def _read(self, name: str, start: int, stop: int) -> np.ndarray:
    first, last = start // _BLOCK, (stop - 1) // _BLOCK
    whole = np.concatenate([self._blocks[index][name] for index in range(first, last + 1)])
    return whole[start - first * _BLOCK : stop - first * _BLOCK]

  def close(self) -> None:
    """Closes the files of the blocks."""
    if isinstance(self._blocks, ArrayRecordDataSource):
      # Its readers open their files at the first read, and close them here.
      self._blocks.data_source.__exit__(None, None, None)


class TokenizedText(LocalBuilder):
  """The splits of a LocalText as blocks of a token stream, with one feature, `tokens`."""

  feature: ClassVar = {"tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32)}

  def __init__(
    self,
    text: Callable[[], LocalText],
    tokenizer: Tokenizer,
    data_dir: str | os.PathLike[str],
  ) -> None:
    self._text = text
    self._tokenizer = tokenizer
    super().__init__(data_dir)

  def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    documents = self._text().as_data_source(split)
    progress = tqdm(documents, f"Encoding {split} documents", unit=" documents", disable=None)
    texts = (document["text"].decode() for document in progress)
    blocks = ({"tokens": block} for block in token_blocks(texts, self._tokenizer))
    yield from enumerate(_report_time(split, blocks))


class EncodedConversations(LocalBuilder):
  """The splits of a LocalText with conversations, as blocks of a token stream.

  The features are `tokens`, `ends` and `learnt`, see `TokenStream`.
  """

  feature: ClassVar = {
    "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
    "ends": tfds.features.Tensor(shape=(None,), dtype=np.uint8),
    "learnt": tfds.features.Tensor(shape=(None,), dtype=np.uint8),
  }

  def __init__(
    self, text: Callable[[], LocalText], encoder: Encoder, data_dir: str | os.PathLike[str]
  ) -> None:
    self._text = text
    self._encoder = encoder
    super().__init__(data_dir)

  def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    documents = self._text().as_data_source(split)
    progress = tqdm(documents, f"Encoding {split} documents", unit=" documents", disable=None)
    encoded = (self._encoder.encode(document["text"].decode()) for document in progress)
    blocks = conversation_blocks(encoded, self._encoder.tokenizer.end_id)
    yield from enumerate(_report_time(split, blocks))


def _report_time(
  split: Split, blocks: Iterable[dict[str, np.ndarray]]
) -> Iterator[dict[str, np.ndarray]]:
  """The blocks; logs their tokens and the time to encode and write them."""
  begin, tokens = time.perf_counter(), 0
  for block in blocks:
    tokens += len(block["tokens"])
    yield block
  seconds = time.perf_counter() - begin
  logging.info("Encoded the %s documents: %s tokens in %.1f s.", split, f"{tokens:,}", seconds)


def build_conversation_stream(
  text: Callable[[], LocalText], encoder: Encoder, folder: pathlib.Path, *, repair: bool = False
) -> EncodedConversations:
  """`build_token_stream` for a corpus with conversations; the folder changes with the encoder."""
  return build(
    lambda data_dir: EncodedConversations(text, encoder, data_dir), folder, repair=repair
  )


def conversation_blocks(
  encoded: Iterable[Encoded], end_id: int
) -> Iterator[dict[str, Int[np.ndarray, "T"]]]:
  """The stream of documents in blocks of one length; the last may be shorter.

  Args:
    encoded: the documents.
    end_id: the end token, before the first document and after each.
  """

  def pieces() -> Iterator[np.ndarray]:
    """Columns: token, whether it ends a document, whether it is learnt."""
    yield np.array([[end_id, 1, 0]], np.int32)
    for document in encoded:
      ends_T = np.zeros_like(document.tokens)
      yield np.stack([document.tokens, ends_T, document.learnt], axis=1).astype(np.int32)
      yield np.array([[end_id, 1, document.end_learnt]], np.int32)

  for block_Tx3 in cut_blocks(pieces()):
    tokens_T, ends_T, learnt_T = block_Tx3.T
    yield {
      "tokens": np.ascontiguousarray(tokens_T),
      "ends": ends_T.astype(np.uint8),
      "learnt": learnt_T.astype(np.uint8),
    }


def build_token_stream(
  text: Callable[[], LocalText],
  tokenizer: Tokenizer,
  folder: pathlib.Path,
  *,
  repair: bool = False,
) -> TokenizedText:
  """The tokens of a text data set as a data set in a folder, whose path has to change with both.

  Args:
    text: makes the text data set; called only where the tokens are not there yet.
    tokenizer: of the tokens.
    folder: of the data set.
    repair: build a damaged data set anew.

  Raises:
    OSError: the data set is damaged, or could not be written.
    ValueError: what `text` raises.
  """
  return build(lambda data_dir: TokenizedText(text, tokenizer, data_dir), folder, repair=repair)


def token_blocks(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[Int[np.ndarray, "T"]]:
  """The int32 token stream of texts in blocks of one length; the last may be shorter."""
  yield from cut_blocks(_stream(texts, tokenizer))


def cut_blocks(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """Arrays [T, ...] of consecutive positions, cut anew into blocks of `_BLOCK` positions."""
  pending: list[np.ndarray] = []
  size = 0
  for piece in pieces:
    pending.append(piece)
    size += len(piece)
    if size >= _BLOCK:
      joined = np.concatenate(pending)
      size = len(joined) % _BLOCK
      whole = len(joined) - size
      yield from joined[:whole].reshape(-1, _BLOCK, *joined.shape[1:])
      pending = [joined[whole:]]
  if size:
    yield np.concatenate(pending)


def _stream(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
  """The stream as arrays of whole documents, each with its end token."""
  end = np.array([tokenizer.end_id], np.int32)
  yield end
  for group in _groups(texts):
    for ids in tokenizer.encode_batch(group):
      yield np.array(ids, np.int32)
      yield end


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
  group: list[str] = []
  size = 0
  for text in texts:
    group.append(text)
    size += len(text)
    if size >= _ENCODE_CHARACTERS:
      yield group
      group, size = [], 0
  yield group
