"""Configuration of the data: which files or which task, cut and packed how."""

import dataclasses
from typing import Any, get_args, Literal

DataKind = Literal["text", "recall"]
TokenizerKind = Literal["byte", "bpe"]

PYTHON_STDLIB = "python-stdlib"


def _require_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
  value = getattr(config, name)
  if value not in choices:
    raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}.")


def _require_int(config: Any, name: str, least: int) -> None:
  value = getattr(config, name)
  if not isinstance(value, int) or isinstance(value, bool) or value < least:
    raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}.")


def _require_seconds(config: Any, name: str) -> None:
  value = getattr(config, name)
  if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
    raise ValueError(f"{name} is {value!r}; it must be a number of seconds above 0.")


@dataclasses.dataclass(frozen=True)
class RecallConfig:
  """A recall task made by code: pairs scattered in noise, asked for at the end (see recall.py).

  Attributes:
    num_pairs: key-value pairs of a task at full difficulty, where a task fills a row.
    first_pairs: pairs of a task at the curriculum's begin.
    first_length: tokens of a task at the curriculum's begin, at least 4 * first_pairs; the row
      length has to be a power of two times it.
    curriculum_rows: training rows over which the tasks grow; 0 trains at full difficulty from the
      start. Held-out rows are always at full difficulty.
    num_keys: key tokens in the vocabulary.
    num_values: value tokens in the vocabulary; guessing is right once in `num_values` answers.
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
    for field in dataclasses.fields(self):
      _require_int(self, field.name, 0 if field.name == "curriculum_rows" else 1)
    if self.first_pairs > self.num_pairs:
      raise ValueError(
        f"first_pairs is {self.first_pairs}; it must be at most num_pairs, which is "
        f"{self.num_pairs}."
      )
    if self.num_pairs > self.num_keys:
      raise ValueError(
        f"num_keys is {self.num_keys}; the keys of a task differ, so it must be at least "
        f"num_pairs, which is {self.num_pairs}."
      )

    if self.first_length < 4 * self.first_pairs:
      raise ValueError(
        f"first_length is {self.first_length}; {self.first_pairs} pairs that are asked for need "
        f"at least {4 * self.first_pairs} tokens."
      )

  def check_row(self, length: int, max_documents: int | None) -> None:
    """Raises ValueError if rows of `length` tokens cannot hold the tasks of the curriculum."""
    if length < 4 * self.num_pairs:
      raise ValueError(
        f"sequence_length is {length}; {self.num_pairs} pairs that are asked for need at least "
        f"{4 * self.num_pairs} tokens."
      )
    if not self.curriculum_rows:
      return
    num_tasks, rest = divmod(length, self.first_length)
    if rest or num_tasks.bit_count() != 1:
      raise ValueError(
        f"sequence_length is {length}; it must be a power of two times recall.first_length, which "
        f"is {self.first_length}."
      )
    if max_documents is not None and max_documents < num_tasks:
      raise ValueError(
        f"max_documents is {max_documents}; the curriculum begins with {num_tasks} tasks in a row."
      )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the training and the held-out batches come from.

  Attributes:
    kind: "text" reads files, "recall" makes recall tasks by code.
    sequence_length: L, tokens of a batch row.
    train_files: files or glob patterns ("**" crosses folders); "python-stdlib" stands for the
      running Python's own library source. Text alone.
    validation_files: the same, held out. Empty holds out some of the training documents: of the
      long ones every 8th, of the others every 16th.
    tokenizer: "byte", or "bpe" trained on the training documents. Text alone.
    vocab_size: entries of the BPE tokenizer, end-of-document token included; "byte" has 257.
    max_documents: most documents of a row; None for no bound. Where it is 1 attention needs no mask
      of documents, and dense attention on GPUs can be cuDNN's.
    prefetch_batches: batches made ahead by one thread of this process; 0 makes each when asked.
      The thread yields several million tokens a second, so there are no worker processes.
    stall_warning_seconds: a batch that takes longer is warned about, again and again.
    stall_error_seconds: one that takes longer ends the run.
    cache_dir: folder of the prepared text and tokens, shared by runs; None keeps them in the
      workdir.
    recall: the recall task, for kind "recall".
  """

  kind: DataKind = "text"
  sequence_length: int = 2048
  train_files: tuple[str, ...] = (PYTHON_STDLIB,)
  validation_files: tuple[str, ...] = ()
  tokenizer: TokenizerKind = "bpe"
  vocab_size: int = 4096
  max_documents: int | None = None
  prefetch_batches: int = 4
  stall_warning_seconds: float = 30.0
  stall_error_seconds: float = 1800.0
  cache_dir: str | None = None
  recall: RecallConfig = RecallConfig()

  def __post_init__(self) -> None:
    _require_choice(self, "kind", get_args(DataKind))
    _require_choice(self, "tokenizer", get_args(TokenizerKind))
    _require_int(self, "sequence_length", 2)
    _require_int(self, "vocab_size", 257)
    _require_int(self, "prefetch_batches", 0)
    for name in ("stall_warning_seconds", "stall_error_seconds"):
      _require_seconds(self, name)
    if self.max_documents is not None:
      _require_int(self, "max_documents", 1)
    for name in ("train_files", "validation_files"):
      patterns = getattr(self, name)
      if not isinstance(patterns, tuple) or not all(isinstance(item, str) for item in patterns):
        raise ValueError(f"{name} is {patterns!r}; it must be a tuple of paths or patterns.")
    if self.kind == "text" and not self.train_files:
      raise ValueError(f"train_files is empty; name text files or {PYTHON_STDLIB!r}.")
    if self.kind == "recall":
      self.recall.check_row(self.sequence_length, self.max_documents)
