"""Configuration of the training data: text, sound or a synthetic task, and how rows are packed."""

import dataclasses
import math
from typing import Literal

from dga_jax.config_dataclasses import (
  config_error,
  field_names,
  require_choice,
  require_int,
  require_number,
)
from dga_jax.files.paths import check_path

DataKind = Literal["text", "recall", "audio"]
TokenizerKind = Literal["byte", "bpe"]

PYTHON_STDLIB = "python-stdlib"


@dataclasses.dataclass(frozen=True)
class RecallConfig:
  """A synthetic recall task: key-value pairs scattered in noise, queried at the end (recall.py).

  Attributes:
    num_pairs: key-value pairs of a task at full difficulty, when one task fills a row.
    first_pairs: pairs of a task at the start of the curriculum.
    first_length: tokens of a task at the start of the curriculum, at least 4 * first_pairs. The
      row length must be a power of two times `first_length`.
    curriculum_rows: training rows over which the tasks grow; 0 trains at full difficulty from the
      start. Held-out rows are always at full difficulty.
    num_keys: key tokens in the vocabulary.
    num_values: value tokens in the vocabulary; a random guess is right once in `num_values`
      answers.
    num_noise: noise tokens in the vocabulary.
    validation_rows: held-out rows.
  """

  num_pairs: int = 32
  first_pairs: int = 4
  first_length: int = 32
  curriculum_rows: int = 0
  num_keys: int = 64
  num_values: int = 64
  num_noise: int = 64
  validation_rows: int = 256

  def __post_init__(self) -> None:
    for name in field_names(type(self)):
      require_int(self, name, least=0 if name == "curriculum_rows" else 1)
    if self.first_pairs > self.num_pairs:
      raise config_error(self, "first_pairs", f"at most num_pairs={self.num_pairs}")
    if self.num_pairs > self.num_keys:
      raise config_error(
        self, "num_keys", f"at least num_pairs={self.num_pairs}, since the keys of a task differ"
      )
    if self.first_length < 4 * self.first_pairs:
      raise config_error(
        self,
        "first_length",
        f"at least 4 * first_pairs={4 * self.first_pairs}, a task's pairs and questions",
      )

  def check_row(self, length: int, max_documents: int | None) -> None:
    """Raises ValueError if rows of `length` tokens cannot hold the tasks of the curriculum."""
    if length < 4 * self.num_pairs:
      raise ValueError(
        f"DataConfig.sequence_length is {length}; {self.num_pairs} pairs with their questions need"
        f" at least {4 * self.num_pairs} tokens."
      )
    if not self.curriculum_rows:
      return
    num_tasks, rest = divmod(length, self.first_length)
    if rest or num_tasks.bit_count() != 1:
      raise ValueError(
        f"DataConfig.sequence_length is {length}; it must be a power of two times"
        f" recall.first_length={self.first_length}."
      )
    if max_documents is not None and max_documents < num_tasks:
      raise ValueError(
        f"DataConfig.max_documents is {max_documents}; it must be at least {num_tasks}, the tasks"
        " of a row at the start of the curriculum."
      )


@dataclasses.dataclass(frozen=True)
class AudioConfig:
  """How sound becomes tokens (audio.py).

  Attributes:
    sample_rate: samples, and so tokens, a second. Files with another rate are resampled.
  """

  sample_rate: int = 8000

  def __post_init__(self) -> None:
    require_int(self, "sample_rate", least=1000, most=192_000)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the training and the held-out batches come from.

  Attributes:
    kind: "text" and "audio" read files; "recall" generates recall tasks.
    sequence_length: L, tokens of a batch row.
    train_files: for kinds "text" and "audio", files or glob patterns ("**" crosses folders);
      "python-stdlib" is the library source of the running Python.
    validation_files: held-out files, in the same notation. If empty, some training documents are
      held out: every 8th of the long ones and every 16th of the others; of audio every 8th file.
    weights: makes each entry of `train_files` a corpus of its own. A corpus gives this share of the
      training rows (the weights are divided by their sum), and is shuffled and repeated by itself.
      `validation_files` then has one entry for each corpus or none. Empty: all files are one
      corpus, in which every document comes once per epoch.
    tokenizer: for kind "text", "byte", or "bpe" trained on the training documents.
    vocab_size: entries of the BPE tokenizer, end-of-document token included; "byte" has 257.
    max_documents: largest number of documents packed in a row; None for no bound. With 1,
      attention needs no document mask, and dense attention on GPUs can use cuDNN.
    prefetch_batches: batches that one thread of this process prepares ahead; 0 prepares each batch
      on request. The thread prepares several million tokens a second, so no worker processes are
      needed.
    stall_warning_seconds: the trainer warns, repeatedly, about a batch that takes longer.
    stall_error_seconds: a batch that takes longer ends the run.
    cache_dir: folder for the prepared text and tokens, shared by runs; None keeps them in the
      workdir.
    recall: the task of kind "recall".
    audio: how kind "audio" reads files.
  """

  kind: DataKind = "text"
  sequence_length: int = 2048
  train_files: tuple[str, ...] = (PYTHON_STDLIB,)
  validation_files: tuple[str, ...] = ()
  weights: tuple[float, ...] = ()
  tokenizer: TokenizerKind = "bpe"
  vocab_size: int = 4096
  max_documents: int | None = None
  prefetch_batches: int = 4
  stall_warning_seconds: float = 30.0
  stall_error_seconds: float = 1800.0
  cache_dir: str | None = None
  recall: RecallConfig = RecallConfig()
  audio: AudioConfig = AudioConfig()

  def __post_init__(self) -> None:
    require_choice(self, "kind", DataKind)
    require_choice(self, "tokenizer", TokenizerKind)
    require_int(self, "sequence_length", least=2)
    require_int(self, "vocab_size", least=257)
    require_int(self, "prefetch_batches", least=0)
    require_int(self, "max_documents", least=1, optional=True)
    require_number(self, "stall_warning_seconds", "stall_error_seconds", above=0)
    for name in ("train_files", "validation_files"):
      patterns = getattr(self, name)
      if not isinstance(patterns, tuple) or not all(isinstance(item, str) for item in patterns):
        raise config_error(self, name, "a tuple of paths or patterns")
      for pattern in patterns:
        check_path(f"DataConfig.{name}", pattern)
    if not isinstance(self.cache_dir, str | None):
      raise config_error(self, "cache_dir", "a folder or None")
    if self.cache_dir is not None:
      check_path("DataConfig.cache_dir", self.cache_dir)
    if self.kind == "text" and not self.train_files:
      raise config_error(self, "train_files", f"text files, or {PYTHON_STDLIB!r}")
    if self.kind == "audio" and (not self.train_files or PYTHON_STDLIB in self.train_files):
      raise config_error(self, "train_files", "WAV or FLAC files, since kind is 'audio'")
    self._check_weights()
    if self.kind == "recall":
      self.recall.check_row(self.sequence_length, self.max_documents)

  def _check_weights(self) -> None:
    weights = self.weights
    if not isinstance(weights, tuple) or not all(
      isinstance(weight, int | float) and math.isfinite(weight) and weight > 0 for weight in weights
    ):
      raise config_error(self, "weights", "a tuple of positive numbers")
    if not weights:
      return
    if self.kind != "text" or len(weights) != len(self.train_files):
      raise config_error(
        self, "weights", f"one number for each of the {len(self.train_files)} train_files, of text"
      )
    if len(set(self.train_files)) < len(self.train_files):
      raise config_error(self, "train_files", "different entries, since each is a corpus")
    if self.validation_files and len(self.validation_files) != len(weights):
      raise config_error(
        self, "validation_files", f"empty, or one entry for each of the {len(weights)} weights"
      )
