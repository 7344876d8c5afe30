"""Recall tasks: a function of (seed, index), solvable, harder later in the curriculum."""

import dataclasses
import itertools
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from train.data.config import DataConfig, RecallConfig
from train.data.files import Split
from train.data.recall import difficulty, recall_row, recall_source
from train.data.rows import Row

GROWING = {"kind": "recall", "sequence_length": 256, "recall": RecallConfig(curriculum_rows=9)}
SPLITS: tuple[Split, ...] = ("train", "validation")


@st.composite
def tasks(draw: st.DrawFn) -> tuple[RecallConfig, int]:
  """A config and its row length."""
  first_pairs = draw(st.integers(1, 5))
  first_length = 4 * first_pairs + draw(st.integers(0, 9))
  length = first_length << draw(st.integers(0, 4))
  num_pairs = draw(st.integers(first_pairs, length // 4))
  config = RecallConfig(
    num_pairs=num_pairs,
    first_pairs=first_pairs,
    first_length=first_length,
    curriculum_rows=draw(st.integers(0, 100)),
    num_keys=num_pairs + draw(st.integers(0, 20)),
    num_values=draw(st.integers(1, 40)),
    num_noise=draw(st.integers(1, 40)),
  )
  config.check_row(length, length // first_length)
  return config, length


def answers(config: RecallConfig, row: Row) -> list[int]:
  """The answers of each task, found by looking up each question in the noise."""
  found = []
  for task in range(1, row["segment_ids"].max() + 1):
    inputs, asked = (row[name][row["segment_ids"] == task] for name in ("inputs", "loss_mask"))
    noise = inputs[: np.flatnonzero(asked)[0]]
    places = np.flatnonzero((noise >= 1) & (noise <= config.num_keys))
    values = dict(zip(noise[places].tolist(), noise[places + 1].tolist(), strict=True))
    # Each key has one value, and each pair is asked for once.
    assert len(values) == len(places)
    assert sorted(values) == sorted(inputs[asked].tolist())
    found += [values[question] for question in inputs[asked].tolist()]
  return found


@hypothesis.given(task=tasks(), seed=st.integers(0, 2**32 - 1), index=st.integers(0, 200))
def test_looking_up_the_pairs_answers_every_question(
  task: tuple[RecallConfig, int], seed: int, index: int
) -> None:
  config, length = task
  for split in SPLITS:
    row = recall_row(config, length, seed, split, index)
    assert {array.shape for array in row.values()} == {(length,)}
    assert answers(config, row) == row["targets"][row["loss_mask"]].tolist()
    num_tokens, num_pairs = difficulty(config, length, index if split == "train" else 10**9)
    assert row["segment_ids"].tolist() == [1 + place // num_tokens for place in range(length)]
    assert row["loss_mask"].sum() == num_pairs * length // num_tokens
    vocab_size = 1 + config.num_keys + config.num_values + config.num_noise
    assert row["inputs"].min() >= 1
    assert row["inputs"].max() < vocab_size
    same_task = row["segment_ids"][1:] == row["segment_ids"][:-1]
    np.testing.assert_array_equal(row["inputs"][1:][same_task], row["targets"][:-1][same_task])


@hypothesis.given(task=tasks(), index=st.integers(0, 1000))
def test_a_row_is_a_function_of_seed_split_and_index(
  task: tuple[RecallConfig, int], index: int
) -> None:
  config, length = task
  config = dataclasses.replace(config, num_keys=200, num_values=200, num_noise=200)

  def content(seed: int, split: Split, index: int) -> bytes:
    return recall_row(config, length, seed, split, index)["inputs"].tobytes()

  arguments = list(itertools.product((3, 4), SPLITS, (index, index + 1)))
  assert len({content(*each) for each in arguments}) == len(arguments)
  assert content(*arguments[0]) == content(*arguments[0])


def test_tasks_grow_stage_by_stage_to_full_difficulty() -> None:
  config = RecallConfig(num_pairs=32, first_pairs=4, first_length=32, curriculum_rows=8)
  stages = [difficulty(config, 256, index) for index in range(10)]
  assert stages == [(32, 4)] * 4 + [(64, 8)] * 2 + [(128, 16)] * 2 + [(256, 32)] * 2
  two_stages = [difficulty(config, 64, index) for index in range(10)]
  assert two_stages == [(32, 4)] * 8 + [(64, 32)] * 2
  at_once = dataclasses.replace(config, curriculum_rows=0)
  assert difficulty(at_once, 256, 0) == difficulty(config, 256, 10**12) == (256, 32)
  assert difficulty(config, 32, 0) == (32, 32)
  assert [difficulty(config, 256, index)[1] for index in (0, 4, 6, 8)] == [4, 8, 16, 32]


def test_places_and_answers_are_spread_evenly() -> None:
  config = RecallConfig(num_pairs=4, num_keys=8, num_values=4, num_noise=4)
  rows = [recall_row(config, 32, 0, "validation", index) for index in range(2000)]
  # 33 tokens; the last 8 are questions.
  is_key = np.array([row["inputs"][:25] <= 8 for row in rows])
  per_place = is_key.sum(axis=0)
  # 8000 pairs start at 24 positions: about 333 at each.
  assert per_place[24] == 0
  assert per_place[:24].min() > 230
  assert per_place[:24].max() < 450
  values = np.concatenate([row["targets"][row["loss_mask"]] for row in rows])
  counts = np.bincount(values - 9)
  assert len(counts) == 4
  assert counts.min() > 1850


def test_the_source_counts_and_names_its_tokens() -> None:
  task = RecallConfig(2, 2, num_keys=2, num_values=3, num_noise=4, validation_rows=5)
  source = recall_source(DataConfig("recall", 16, recall=task), seed=0)
  assert source.tokenizer.vocab_size == 1 + 2 + 3 + 4
  assert source.tokenizer.encode("k0 k1 v0 v2 n0 n3") == [1, 2, 3, 5, 6, 9]
  assert len(source.validation[""]) == 5
  words = source.tokenizer.decode(source.train[10**9]["inputs"]).split()
  assert {word[0] for word in words} == {"k", "v", "n"}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_pairs": 0}, "num_pairs is 0; it must be an integer of at least 1"),
    ({"curriculum_rows": -1}, "curriculum_rows is -1"),
    ({"first_pairs": 33}, "first_pairs is 33; it must be at most num_pairs=32"),
    ({"first_length": 15}, "first_length is 15; .* at least .*=16"),
    ({"num_keys": 31}, "num_keys is 31; .* at least num_pairs=32"),
  ],
)
def test_tasks_that_make_no_sense_are_refused(changes: dict[str, int], message: str) -> None:
  with pytest.raises(ValueError, match=message):
    RecallConfig(**changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"kind": "images"}, "kind is 'images'; it must be one of 'text', 'recall'"),
    ({"tokenizer": "words"}, "tokenizer is 'words'"),
    ({"sequence_length": 1}, "sequence_length is 1; it must be an integer of at least 2"),
    ({"sequence_length": 64.0}, "sequence_length is 64.0"),
    ({"vocab_size": 256}, "vocab_size is 256"),
    ({"max_documents": 0}, "max_documents is 0"),
    ({"prefetch_batches": -1}, "prefetch_batches is -1"),
    ({"train_files": ()}, r"train_files is \(\); it must be text files"),
    ({"train_files": "a.txt"}, "train_files is 'a.txt'; it must be a tuple"),
    ({"kind": "recall", "sequence_length": 127}, "sequence_length is 127; 32 pairs .* 128"),
    ({**GROWING, "sequence_length": 130}, "sequence_length is 130; .* power of two times .*32"),
    ({**GROWING, "sequence_length": 192}, "sequence_length is 192; .* power of two times .*32"),
    ({**GROWING, "max_documents": 7}, "max_documents is 7; .* at least 8, the tasks"),
  ],
)
def test_data_configs_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
  with pytest.raises(ValueError, match=message):
    DataConfig(**changes)
