"""Recall tasks made by code: pairs scattered in noise, asked for at the end.

A task of N + 1 tokens, of which the last N are the targets of the first N:

  noise key value noise noise key value noise ... | key value  key value  ... key value
  each pair once, at a random place in the noise  | each pair once more, in random order

In the second part each key is a question; the value that stood behind that key is its answer and
the next token. The loss is on the answers alone.

At full difficulty a row of L tokens is one task. A small model that trains on full difficulty from
the start learns to answer with any value of its context and no more. So training starts with rows
of many short tasks of few pairs, packed as documents, in which a model soon learns to copy the
token after a repeated key. In each further stage the tasks are twice as long, up to L, with more
pairs.

Rows are made from (seed, index) when they are read; none is stored.

Vocabulary, in this order: the end token (in no task), num_keys keys "k0", "k1", ..., num_values
values "v0", ..., num_noise noise words "n0", ...
"""

import functools
import sys
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Int

from dga_jax.tokenizer import Tokenizer
from train.data.config import DataConfig, RecallConfig
from train.data.files import Split
from train.data.rows import Row, Source

_STREAMS: dict[Split, int] = {"train": 0, "validation": 1}


def recall_source(config: DataConfig, seed: int) -> Source:
  """The rows of a config's recall task: training along the curriculum, validation at its end."""
  task = config.recall
  train = functools.partial(recall_row, task, config.sequence_length, seed, "train")
  validation = functools.partial(recall_row, task, config.sequence_length, seed, "validation")
  return Source(
    tokenizer=Tokenizer.words(list(_words(task))),
    fingerprint="recall",
    train=grain.MapDataset.range(sys.maxsize).map(train),
    validation={"": grain.MapDataset.range(task.validation_rows).map(validation)},
  )


def difficulty(config: RecallConfig, length: int, index: int) -> tuple[int, int]:
  """Tokens and pairs of each task in the training row `index`, at row length `length`.

  From one stage of the curriculum to the next the tokens double and the pairs grow by an equal
  factor; after the curriculum there are `length` tokens and config.num_pairs pairs. The first
  stage, in which a model has to learn to copy, takes half of the curriculum, the others equal
  shares.
  """
  doublings = (length // config.first_length).bit_length() - 1
  if index >= config.curriculum_rows or not doublings:
    return length, config.num_pairs
  later_stage = 1 + (doublings - 1) * (2 * index - config.curriculum_rows) // config.curriculum_rows
  stage = max(0, min(later_stage, doublings - 1))
  growth = config.num_pairs / config.first_pairs
  # Rounded down, for which 15.999... is meant to be 16.
  num_pairs = int(config.first_pairs * growth ** (stage / doublings) + 1e-6)
  return config.first_length << stage, num_pairs


def recall_row(config: RecallConfig, length: int, seed: int, split: Split, index: int) -> Row:
  """A row of tasks, a function of its arguments alone.

  Args:
    config: the task.
    length: L, one that config.check_row accepts.
    seed: of all rows.
    split: "train" follows the curriculum, "validation" is at full difficulty.
    index: number of the row in its split.

  Returns:
    inputs, targets, segment_ids (tasks from 1 on) and loss_mask (true at questions), [L] each.
  """
  rng = np.random.default_rng((seed, _STREAMS[split], index))
  whole = (length, config.num_pairs)
  num_tokens, num_pairs = difficulty(config, length, index) if split == "train" else whole
  num_tasks = length // num_tokens
  first_key, first_value, first_noise, vocab_size = np.cumsum(
    (1, config.num_keys, config.num_values, config.num_noise)
  )
  keys_TxP = first_key + _draw(rng, num_tasks, config.num_keys, num_pairs)
  values_TxP = rng.integers(first_value, first_noise, (num_tasks, num_pairs))
  tokens_TxN = rng.integers(first_noise, vocab_size, (num_tasks, num_tokens + 1))

  first_question = num_tokens + 1 - 2 * num_pairs
  # Places of single items, in order; then each item becomes two tokens.
  places_TxP = np.sort(_draw(rng, num_tasks, first_question - num_pairs, num_pairs), axis=1)
  places_TxP += np.arange(num_pairs)
  np.put_along_axis(tokens_TxN, places_TxP, keys_TxP, axis=1)
  np.put_along_axis(tokens_TxN, places_TxP + 1, values_TxP, axis=1)

  asked_TxP = _draw(rng, num_tasks, num_pairs, num_pairs)
  tokens_TxN[:, first_question::2] = np.take_along_axis(keys_TxP, asked_TxP, axis=1)
  tokens_TxN[:, first_question + 1 :: 2] = np.take_along_axis(values_TxP, asked_TxP, axis=1)

  is_question_N = np.zeros(num_tokens, bool)
  is_question_N[first_question::2] = True
  return {
    "inputs": tokens_TxN[:, :-1].reshape(length).astype(np.int32),
    "targets": tokens_TxN[:, 1:].reshape(length).astype(np.int32),
    "segment_ids": np.repeat(np.arange(1, num_tasks + 1, dtype=np.int32), num_tokens),
    "loss_mask": np.tile(is_question_N, num_tasks),
  }


def _draw(
  rng: np.random.Generator, num_tasks: int, bound: int, count: int
) -> Int[np.ndarray, "T P"]:
  """For each task `count` different integers from 0 to bound - 1, in random order."""
  return rng.permuted(np.tile(np.arange(bound), (num_tasks, 1)), axis=1)[:, :count]


def _words(config: RecallConfig) -> Iterator[str]:
  yield from (f"k{i}" for i in range(config.num_keys))
  yield from (f"v{i}" for i in range(config.num_values))
  yield from (f"n{i}" for i in range(config.num_noise))
