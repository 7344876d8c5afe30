"""Batches of token ids, for training without end and for one pass over the held-out data.

A batch is a dict of arrays [rows, L]:
  inputs: int32 tokens.
  targets: int32, the token after each input.
  segment_ids: int32, the documents of a row numbered from 1; -1 is padding.
  loss_mask: bool, where the target is to be learnt.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping

import grain
import numpy as np
from jaxtyping import Shaped

from dga_jax.chat.template import ChatTemplate
from dga_jax.files.paths import check_path
from dga_jax.tokenizer import Tokenizer
from train.data.audio import audio_source
from train.data.config import DataConfig
from train.data.recall import recall_source
from train.data.rows import padding_row, Row, Source
from train.data.text import text_source

type Batch = dict[str, Shaped[np.ndarray, "B L"]]


@dataclasses.dataclass(frozen=True)
class Data:
  """What a training run reads.

  Attributes:
    tokenizer: between text and the ids of the batches.
    fingerprint: changes with the text and the tokenizer; a run resumes only with the fingerprint
      that it started with.
    train: batches without end; text comes once per epoch, in a new order in each. Its iterators
      have `get_state` and `set_state`, whose state is {"next_index": batches taken}, the same in
      every process and for any number of them.
    validation: the held-out rows of each corpus, once and always in the same order; rows of padding
      fill up the last batch. The keys are the entries of config.train_files, or "" for one corpus.
    train_rows: training rows of each corpus, under the keys of `validation`; empty for a task,
      whose rows never repeat.
    close: closes the files that the batches are read from.
  """

  tokenizer: Tokenizer
  fingerprint: str
  train: grain.IterDataset[Batch]
  validation: Mapping[str, grain.IterDataset[Batch]]
  train_rows: Mapping[str, int]
  close: Callable[[], None]

  def reads(self, config: DataConfig, rows: int) -> dict[str, float]:
    """How often a run reads each corpus: its part of the run's rows over the corpus's own rows.

    Args:
      config: that the data were loaded with.
      rows: of all batches of the run.

    Returns:
      A number for each key of `train_rows`.
    """
    weights = config.weights or (1.0,) * len(self.train_rows)
    return {
      name: rows * weight / sum(weights) / own
      for (name, own), weight in zip(self.train_rows.items(), weights, strict=True)
    }


def load_data(
  config: DataConfig,
  workdir: str | os.PathLike[str],
  *,
  seed: int,
  batch_size: int,
  tokenizer: Tokenizer | None = None,
  template: ChatTemplate | None = None,
  process_index: int = 0,
  process_count: int = 1,
  repair: bool = False,
  fingerprint: str | None = None,
) -> Data:
  """Prepares the data unless they are there, and makes this process's batches.

  A global batch is the same for any number of processes: process p of P gets its rows
  p * batch_size / P, ..., (p + 1) * batch_size / P - 1.

  Args:
    config: what to read and how to cut it.
    workdir: the prepared files go to its folder "data", unless config.cache_dir is set.
    seed: of the order of the training rows or of the recall task, 0 to 2**32 - 1.
    batch_size: rows of a global batch.
    tokenizer: of the model that training begins with, in place of the config's; a recall task
      needs one with its own words.
    template: of that model, for conversations.
    process_index: number of this process, among those that read different rows.
    process_count: the number of these processes, a divisor of batch_size.
    repair: prepare damaged files anew.
    fingerprint: that the data must have, see `Data.fingerprint`; None for any. Files of another one
      are not prepared.

  Raises:
    FileNotFoundError: a file or pattern of the config that matches nothing.
    OSError: the prepared files are damaged, or could not be written.
    ValueError: files that cannot be read as text, data of another fingerprint, or arguments that
      make no sense.
  """
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"batch_size is {batch_size}; it must be a positive multiple of the number of processes, "
      f"which is {process_count}."
    )
  source = _open_source(
    config, workdir, seed, tokenizer, template, repair=repair, fingerprint=fingerprint
  )

  def batches(rows: grain.MapDataset[Row]) -> grain.IterDataset[Batch]:
    # Batches of one process's size, dealt in turn to the processes, keep a global batch's rows in
    # order. drop_remainder: there is none, and grain then counts endless batches of one row without
    # an overflow.
    local_batches = rows.batch(batch_size // process_count, drop_remainder=True)
    dealt = local_batches[process_index::process_count]
    threads = min(1, config.prefetch_batches)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.prefetch_batches)
    return dealt.to_iter_dataset(options)

  def held_out(rows: grain.MapDataset[Row]) -> grain.IterDataset[Batch]:
    missing = -len(rows) % batch_size
    if missing:
      padding = grain.MapDataset.source([padding_row(config.sequence_length)] * missing)
      rows = grain.MapDataset.concatenate([rows, padding])
    return batches(rows)

  return Data(
    tokenizer=source.tokenizer,
    fingerprint=source.fingerprint,
    train=batches(source.train),
    validation={name: held_out(rows) for name, rows in source.validation.items()},
    train_rows=source.train_rows,
    close=source.close,
  )


def _open_source(
  config: DataConfig,
  workdir: str | os.PathLike[str],
  seed: int,
  tokenizer: Tokenizer | None,
  template: ChatTemplate | None,
  *,
  repair: bool,
  fingerprint: str | None,
) -> Source:
  if config.kind == "recall":
    source = recall_source(config, seed)
  else:
    check_path("workdir", config.cache_dir or workdir)
    cache = pathlib.Path(config.cache_dir or pathlib.Path(workdir) / "data").expanduser()
    if config.kind == "text":
      return text_source(
        config, cache, seed, tokenizer, template, repair=repair, wanted=fingerprint
      )
    source = audio_source(config, cache, seed, repair=repair, wanted=fingerprint)
  if tokenizer is not None and tokenizer.to_json() != source.tokenizer.to_json():
    raise ValueError(
      f"The model of config.init_from has another vocabulary than data of kind {config.kind!r}. "
      "Start from a model that was trained on such data, or without config.init_from."
    )
  return source
