"""Text files to rows: documents are read, tokenized and stored once, cut and packed at each start.

The cache folder has a subfolder <corpus>, with the documents in text/, the tokenizer trained on
them in bpe_<size>/ and their tokens in tokens_<tokenizer>/. <corpus> and <tokenizer> are hashes, so
changed files or another tokenizer go to other folders.
"""

import contextlib
import functools
import hashlib
import pathlib
import sys
from collections.abc import Callable

import grain
from absl import logging

from dga_jax.tokenizer import Tokenizer
from train.data.config import DataConfig
from train.data.files import Corpus, Split
from train.data.local_text import build_local_text, LocalText
from train.data.packing import cut, pack, Span
from train.data.prepared import prepare
from train.data.rows import padding_row, Row, Source
from train.data.token_stream import build_token_stream, TokenStream


class TextRows:
  """The packed rows of a token stream, with random access for grain.

  Args:
    stream: the documents' tokens.
    length: L, tokens of a row.
    max_documents: most documents of a row, None for no bound.
  """

  def __init__(self, stream: TokenStream, length: int, max_documents: int | None) -> None:
    self._stream = stream
    self._length = length
    self._rows: list[list[Span]] = pack(cut(stream.ends_N, length), length, max_documents)

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Row:
    row = padding_row(self._length)
    begin = 0
    for segment, span in enumerate(self._rows[index], start=1):
      tokens = self._stream.read(span.start, span.start + span.length + 1)
      place = slice(begin, begin + span.length)
      row["inputs"][place] = tokens[:-1]
      row["targets"][place] = tokens[1:]
      row["segment_ids"][place] = segment
      row["loss_mask"][place] = True
      begin += span.length
    return row


def text_source(
  config: DataConfig,
  cache: pathlib.Path,
  seed: int,
  tokenizer: Tokenizer | None = None,
  *,
  repair: bool = False,
) -> Source:
  """The rows of the files that a config names; training rows are shuffled anew in each epoch.

  Args:
    config: the files, the tokenizer and the row length.
    cache: folder of prepared text and tokens.
    seed: of the order of the training rows.
    tokenizer: in place of the config's.
    repair: prepare damaged files anew.

  Raises:
    FileNotFoundError: a file or pattern that matches nothing.
    OSError: the prepared files are damaged, or could not be written.
    ValueError: files that cannot be read as text, or without text.
  """
  corpus = Corpus.find(config.train_files, config.validation_files)
  fingerprint = corpus.fingerprint()
  folder = cache / fingerprint
  logging.info("The prepared text and tokens are kept in %s.", folder)

  @functools.cache
  def text() -> LocalText:
    return build_local_text(corpus, folder / "text", repair=repair)

  tokenizer = tokenizer or _tokenizer(config, text, folder, repair=repair)
  tokenizer_hash = hashlib.blake2b(tokenizer.to_json().encode(), digest_size=8).hexdigest()
  tokens = build_token_stream(text, tokenizer, folder / f"tokens_{tokenizer_hash}", repair=repair)

  files = contextlib.ExitStack()

  def rows(split: Split) -> grain.MapDataset[Row]:
    stream = TokenStream(tokens.as_data_source(split), tokenizer.end_id)
    files.enter_context(contextlib.closing(stream))
    return grain.MapDataset.source(TextRows(stream, config.sequence_length, config.max_documents))

  return Source(
    tokenizer=tokenizer,
    fingerprint=f"{fingerprint}-{tokenizer_hash}",
    train=rows("train").shuffle(seed).repeat(),
    validation=rows("validation"),
    close=files.close,
  )


def _tokenizer(
  config: DataConfig, text: Callable[[], LocalText], folder: pathlib.Path, *, repair: bool
) -> Tokenizer:
  if config.tokenizer == "byte":
    return Tokenizer.byte_level()

  def build(partial: pathlib.Path) -> None:
    logging.info("Training a BPE tokenizer of %d tokens.", config.vocab_size)
    documents = (example["text"].decode() for example in text().as_data_source("train"))
    progress = sys.stderr.isatty()
    Tokenizer.train_bpe(documents, config.vocab_size, progress=progress).save(partial)

  folder /= f"bpe_{config.vocab_size}"
  prepare(folder, build, repair=repair)
  return Tokenizer.load(folder)
