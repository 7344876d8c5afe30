"""Text files to rows: documents are read, tokenized and stored once, cut and packed at each start.

The cache folder has a subfolder <corpus>, with the documents in text/, the tokenizer trained on
them in bpe_<size>/ and their tokens in tokens_<tokenizer>/, or of a corpus with conversations in
conversations_<tokenizer>_<template>/. These names are hashes, so changed files, another tokenizer
or another template go to other folders. The tokenizer of several corpora has a folder of its own.
"""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import sys
from collections.abc import Mapping, Sequence

import grain
from absl import logging

from dga_jax.chat.template import ChatTemplate
from dga_jax.tokenizer import Tokenizer
from train.data.config import DataConfig
from train.data.conversations import Encoder, to_text
from train.data.files import Corpus
from train.data.fingerprint import check_fingerprint
from train.data.local_text import build_local_text, LocalText
from train.data.packed_rows import PackedRows
from train.data.prepared import prepare
from train.data.rows import Source
from train.data.tfds_builder import LocalBuilder
from train.data.token_stream import build_conversation_stream, build_token_stream, TokenStream


@dataclasses.dataclass(frozen=True)
class _PreparedCorpus:
  """A corpus and its folder of prepared data.

  Attributes:
    name: the entry of train_files; "" if all entries are one corpus.
    corpus: the files.
    fingerprint: of the files.
    folder: of the prepared data.
    repair: whether damaged files are prepared anew.
  """

  name: str
  corpus: Corpus
  fingerprint: str
  folder: pathlib.Path
  repair: bool

  @functools.cache  # noqa: B019 (lives as long as the preparation)
  def text(self) -> LocalText:
    """The documents, prepared at the first call."""
    return build_local_text(self.corpus, self.folder / "text", self.fingerprint, repair=self.repair)

  @functools.cached_property
  def has_conversations(self) -> bool:
    return self.corpus.has_conversations()

  def streams(self, encoder: Encoder, tokenizer_hash: str) -> LocalBuilder:
    """The tokens, as a data set of the splits."""
    if self.has_conversations:
      folder = self.folder / f"conversations_{tokenizer_hash}_{encoder.fingerprint()}"
      return build_conversation_stream(self.text, encoder, folder, repair=self.repair)
    folder = self.folder / f"tokens_{tokenizer_hash}"
    return build_token_stream(self.text, encoder.tokenizer, folder, repair=self.repair)


def text_source(
  config: DataConfig,
  cache: pathlib.Path,
  seed: int,
  tokenizer: Tokenizer | None = None,
  template: ChatTemplate | None = None,
  *,
  repair: bool = False,
  wanted: str | None = None,
) -> Source:
  """The rows of the files that a config names; training rows are shuffled anew in each epoch.

  With `config.weights`, rows of the corpora alternate in proportion to their weights.

  Args:
    config: the files, the tokenizer and the row length.
    cache: folder of prepared text and tokens.
    seed: of the order of the training rows.
    tokenizer: in place of the config's.
    template: of conversations; None for the one of `train.data.conversations`.
    repair: prepare damaged files anew.
    wanted: the fingerprint that the data must have; None for any.

  Raises:
    FileNotFoundError: a file or pattern that matches nothing.
    OSError: the prepared files are damaged, or could not be written.
    ValueError: files that cannot be read as text, or without text, or that a corpus trains on and
      another one holds out; or another fingerprint.
  """
  corpora = _find_corpora(config, cache, repair=repair)
  tokenizer = tokenizer or _tokenizer(config, corpora, cache, repair=repair)
  tokenizer_hash = hashlib.blake2b(tokenizer.to_json().encode(), digest_size=8).hexdigest()
  encoder = Encoder(tokenizer, template)
  parts = [_combined(corpora), tokenizer_hash]
  if any(one.has_conversations for one in corpora):
    parts.append(encoder.fingerprint())
  fingerprint = "-".join(parts)
  check_fingerprint(fingerprint, wanted)

  files = contextlib.ExitStack()
  train, validation, train_rows = [], {}, {}
  for index, one in enumerate(corpora):
    tokens = one.streams(encoder, tokenizer_hash)
    rows = {}
    for split in ("train", "validation"):
      stream = TokenStream(tokens.as_data_source(split), tokenizer.end_id)
      files.enter_context(contextlib.closing(stream))
      packed = PackedRows(stream, config.sequence_length, config.max_documents)
      rows[split] = grain.MapDataset.source(packed)
    train.append(rows["train"].shuffle((seed + index) % 2**32).repeat())
    validation[one.name], train_rows[one.name] = rows["validation"], len(rows["train"])

  return Source(
    tokenizer=tokenizer,
    fingerprint=fingerprint,
    train=grain.MapDataset.mix(train, config.weights) if config.weights else train[0],
    validation=validation,
    train_rows=train_rows,
    close=files.close,
  )


def _find_corpora(
  config: DataConfig, cache: pathlib.Path, *, repair: bool
) -> list[_PreparedCorpus]:
  if config.weights:
    held_out: list[tuple[str, ...]] = [(entry,) for entry in config.validation_files]
    held_out = held_out or [()] * len(config.weights)
    found = {
      name: Corpus.find((name,), files)
      for name, files in zip(config.train_files, held_out, strict=True)
    }
  else:
    found = {"": Corpus.find(config.train_files, config.validation_files)}
  trained = {path for corpus in found.values() for path in corpus.train_files}
  both = trained & {path for corpus in found.values() for path in corpus.validation_files}
  if both:
    raise ValueError(
      f"{min(both)} is in train_files of one corpus and validation_files of another."
    )
  if not config.validation_files:
    _refuse_shared_files(found)
  prepared = []
  for name, corpus in found.items():
    fingerprint = corpus.fingerprint()
    folder = cache / fingerprint
    logging.info("The prepared text and tokens%s are kept in %s.", name and f" of {name}", folder)
    prepared.append(_PreparedCorpus(name, corpus, fingerprint, folder, repair))
  return prepared


def _refuse_shared_files(corpora: Mapping[str, Corpus]) -> None:
  """Raises ValueError for a file of two corpora: one would train on what the other holds out."""
  owner: dict[pathlib.Path, str] = {}
  for name, corpus in corpora.items():
    for path in corpus.train_files:
      if path in owner:
        raise ValueError(
          f"{path} is in two corpora, {owner[path]!r} and {name!r} of config.data.train_files. "
          "Each holds out other documents, so held-out documents of the file would be trained on. "
          "Give config.data.validation_files, or patterns that share no file."
        )
      owner[path] = name


def _combined(corpora: Sequence[_PreparedCorpus]) -> str:
  """The fingerprint of all corpora; of a single one its own."""
  if len(corpora) == 1:
    return corpora[0].fingerprint
  joined = " ".join(one.fingerprint for one in corpora)
  return hashlib.blake2b(joined.encode(), digest_size=8).hexdigest()


def _tokenizer(
  config: DataConfig, corpora: Sequence[_PreparedCorpus], cache: pathlib.Path, *, repair: bool
) -> Tokenizer:
  if config.tokenizer == "byte":
    return Tokenizer.byte_level()

  def build(partial: pathlib.Path) -> None:
    logging.info("Training a BPE tokenizer of %d tokens.", config.vocab_size)
    documents = (
      to_text(example["text"].decode())
      for one in corpora
      for example in one.text().as_data_source("train")
    )
    progress = sys.stderr.isatty()
    Tokenizer.train_bpe(documents, config.vocab_size, progress=progress).save(partial)

  folder = cache / _combined(corpora) / f"bpe_{config.vocab_size}"
  prepare(folder, build, repair=repair)
  return Tokenizer.load(folder)
