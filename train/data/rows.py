"""The interface between a source of data and the pipeline: rows of tokens with random access."""

import dataclasses
from collections.abc import Callable, Mapping

import grain
import numpy as np
from jaxtyping import Shaped

from dga_jax.tokenizer import Tokenizer

# One row of a batch: inputs, targets and segment_ids int32, loss_mask bool (see pipeline.py).
type Row = dict[str, Shaped[np.ndarray, "L"]]

PADDING_SEGMENT = -1


@dataclasses.dataclass(frozen=True)
class Source:
  """A corpus or a task, tokenized and cut into rows.

  Attributes:
    tokenizer: between text and the ids of the rows.
    fingerprint: of the text and the tokenizer.
    train: training rows in their final order, without end.
    validation: the held-out rows of each corpus, each row once.
    train_rows: training rows of each corpus, under the keys of `validation`; empty for a task,
      whose rows never repeat.
    close: closes the files that the rows are read from.
  """

  tokenizer: Tokenizer
  fingerprint: str
  train: grain.MapDataset[Row]
  validation: Mapping[str, grain.MapDataset[Row]]
  train_rows: Mapping[str, int] = dataclasses.field(default_factory=dict)
  close: Callable[[], None] = lambda: None


def padding_row(length: int) -> Row:
  """A row without a document."""
  return {
    "inputs": np.zeros(length, np.int32),
    "targets": np.zeros(length, np.int32),
    "segment_ids": np.full(length, PADDING_SEGMENT, np.int32),
    "loss_mask": np.zeros(length, bool),
  }
