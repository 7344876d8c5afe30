"""Audio files to rows: each file is a document of μ-law tokens, stored once and packed.

The cache folder has a subfolder audio_<files>_<sample rate> with the tokens. Its name contains a
hash of the files, so changed files go to another folder.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import ClassVar

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jaxtyping import Int32
from tqdm import tqdm

from dga_jax.audio.files import read_audio
from dga_jax.audio.tokens import audio_tokenizer, samples_to_tokens
from train.data.config import DataConfig
from train.data.files import Corpus, Split
from train.data.fingerprint import check_fingerprint
from train.data.packed_rows import PackedRows
from train.data.rows import Source
from train.data.tfds_builder import build, LocalBuilder
from train.data.token_stream import cut_blocks, TokenStream

_HELD_OUT_STEP = 8  # Every 8th file is held out, unless the config names held-out files.


def audio_source(
  config: DataConfig,
  cache: pathlib.Path,
  seed: int,
  *,
  repair: bool = False,
  wanted: str | None = None,
) -> Source:
  """The rows of the audio files of a config. Training rows are shuffled again in each epoch.

  Args:
    config: the files, the sample rate and the row length.
    cache: folder of the prepared tokens.
    seed: of the order of the training rows.
    repair: prepare damaged files again.
    wanted: the fingerprint that the files must have; None for any.

  Raises:
    FileNotFoundError: a path or pattern that matches no file.
    OSError: the prepared files are damaged, or could not be written.
    ValueError: a file that cannot be read as audio, is empty or silent; no file is held out; or
      another fingerprint.
  """
  corpus = _split(Corpus.find(config.train_files, config.validation_files))
  tokenizer, rate = audio_tokenizer(), config.audio.sample_rate
  files_fingerprint = corpus.fingerprint()
  fingerprint = f"{files_fingerprint}_{rate}"
  check_fingerprint(fingerprint, wanted)
  folder = cache / f"audio_{fingerprint}"
  logging.info("The prepared tokens are kept in %s.", folder)
  tokens = build(
    lambda data_dir: AudioTokens(corpus, rate, tokenizer.end_id, data_dir),
    folder,
    repair=repair,
    check=lambda: corpus.check_unchanged(files_fingerprint),
  )
  files, rows = contextlib.ExitStack(), {}
  for split in ("train", "validation"):
    stream = TokenStream(tokens.as_data_source(split), tokenizer.end_id)
    files.enter_context(contextlib.closing(stream))
    packed = PackedRows(stream, config.sequence_length, config.max_documents)
    rows[split] = grain.MapDataset.source(packed)
  return Source(
    tokenizer=tokenizer,
    fingerprint=fingerprint,
    train=rows["train"].shuffle(seed).repeat(),
    validation={"": rows["validation"]},
    train_rows={"": len(rows["train"])},
    close=files.close,
  )


class AudioTokens(LocalBuilder):
  """The tokens of audio files as blocks of a token stream, with one feature, `tokens`.

  Args:
    corpus: the files of both splits.
    sample_rate: samples a second.
    end_id: the token before the first file and after each.
    data_dir: folder of the data set.
  """

  feature: ClassVar = {"tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32)}

  def __init__(
    self, corpus: Corpus, sample_rate: int, end_id: int, data_dir: str | os.PathLike[str]
  ) -> None:
    self._corpus, self._sample_rate, self._end_id = corpus, sample_rate, end_id
    super().__init__(data_dir)

  def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    is_train = split == "train"
    files = self._corpus.train_files if is_train else self._corpus.validation_files
    progress = tqdm(files, f"Reading {split} audio", unit=" files", disable=None)
    for index, block in enumerate(cut_blocks(self._stream(progress))):
      yield index, {"tokens": block}

  def _stream(self, paths: "tqdm[pathlib.Path]") -> Iterator[Int32[np.ndarray, "T"]]:
    end = np.array([self._end_id], np.int32)
    yield end
    for path in paths:
      yield samples_to_tokens(read_audio(path, self._sample_rate))
      yield end


def _split(corpus: Corpus) -> Corpus:
  """The corpus with held-out files: those of the config, or every 8th."""
  if corpus.validation_files:
    return corpus
  files = corpus.train_files
  held_out = files[_HELD_OUT_STEP - 1 :: _HELD_OUT_STEP]
  if not held_out:
    raise ValueError(
      f"train_files name {len(files)} files, of which every {_HELD_OUT_STEP}th would "
      "be held out. Name files in validation_files."
    )
  kept = tuple(path for number, path in enumerate(files, 1) if number % _HELD_OUT_STEP)
  return dataclasses.replace(corpus, train_files=kept, validation_files=held_out)
