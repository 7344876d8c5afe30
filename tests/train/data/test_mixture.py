"""Mixtures of corpora: row counts by weight, exact resume, a held-out set for each corpus."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.data.config import DataConfig
from train.data.pipeline import Data, load_data
from train.evaluate import Evaluation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Files a.txt, b.txt and c.txt with different numbers of documents, each of one letter."""
  folder = tmp_path_factory.mktemp("mixture")
  for letter, count in (("a", 20), ("b", 60), ("c", 35)):
    (folder / f"{letter}.txt").write_text("\0".join([letter * 31] * count))
    (folder / f"{letter}_held_out.txt").write_text("\0".join([letter.upper() * 31] * 5))
  return folder


def load(folder: Path, weights: tuple[float, ...], **changes: Any) -> Data:
  files = tuple(str(folder / f"{letter}.txt") for letter in "abc"[: len(weights)])
  settings: dict[str, Any] = {"sequence_length": 32, "tokenizer": "byte", "prefetch_batches": 0}
  config = DataConfig(train_files=files, weights=weights, **settings, **changes.pop("data", {}))
  return load_data(config, folder, **{"seed": 3, "batch_size": 4, **changes})


def letters(batches: list[Any]) -> list[str]:
  """The letter of each row."""
  return [chr(row[0]) for batch in batches for row in batch["targets"]]


def test_rows_come_in_proportion_to_the_weights(folder: Path) -> None:
  held_out = tuple(str(folder / f"{letter}_held_out.txt") for letter in "abc")
  data = load(folder, (3.0, 1.0, 4.0), data={"validation_files": held_out})
  rows = letters(list(itertools.islice(data.train, 200)))
  data.close()
  assert list(data.train_rows.values()) == [20, 60, 35]
  config = DataConfig(train_files=tuple(data.train_rows), weights=(3.0, 1.0, 4.0))
  reads = data.reads(config, 800)
  assert {Path(name).stem: times for name, times in reads.items()} == pytest.approx(
    {"a": rows.count("a") / 20, "b": rows.count("b") / 60, "c": rows.count("c") / 35}, abs=0.2
  )
  assert {letter: count / 800 for letter, count in Counter(rows).items()} == pytest.approx(
    {"a": 3 / 8, "b": 1 / 8, "c": 4 / 8}, abs=0.005
  )
  # The weights hold in every stretch of rows, because the corpora alternate.
  for start in range(0, 800, 80):
    assert Counter(rows[start : start + 80])["b"] == pytest.approx(10, abs=1)


@pytest.mark.parametrize("process_count", [1, 2])
def test_a_mixture_resumes_exactly(folder: Path, process_count: int) -> None:
  whole = load(folder, (1.0, 2.5))
  expected = list(itertools.islice(whole.train, 60))
  whole.close()
  parts = []
  for index in range(process_count):
    data = load(folder, (1.0, 2.5), process_index=index, process_count=process_count)
    batches = iter(data.train)
    batches.set_state({"next_index": 25})
    parts.append(list(itertools.islice(batches, 35)))
    data.close()
  for wanted, *got in zip(expected[25:], *parts, strict=True):
    for name, array in wanted.items():
      np.testing.assert_array_equal(np.concatenate([part[name] for part in got]), array)


def test_each_corpus_has_its_held_out_set(folder: Path) -> None:
  for held_out in ((), tuple(str(folder / f"{letter}_held_out.txt") for letter in "ab")):
    data = load(folder, (1.0, 1.0), data={"validation_files": held_out})
    assert list(data.validation) == [str(folder / "a.txt"), str(folder / "b.txt")]
    for name, batches in data.validation.items():
      letter = Path(name).stem.upper() if held_out else Path(name).stem
      assert set(letters(list(batches))) <= {letter, "\0"}  # The last batch has rows of padding.
    data.close()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"weights": (1.0,)}, "one number for each of the 2 train_files"),
    ({"weights": (1.0, -1.0)}, "a tuple of positive numbers"),
    ({"weights": (1.0, float("nan"))}, "a tuple of positive numbers"),
    ({"weights": (1, 1), "validation_files": ("c.txt",)}, "one entry for each of the 2 weights"),
    ({"weights": (1, 1), "train_files": ("a.txt", "a.txt")}, "each is a corpus"),
  ],
)
def test_weights_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
  with pytest.raises(ValueError, match=message):
    DataConfig(**{"train_files": ("a.txt", "b.txt"), **changes})


def test_a_file_in_one_corpus_is_not_held_out_in_another(folder: Path) -> None:
  held_out = (str(folder / "b.txt"), str(folder / "b_held_out.txt"))
  with pytest.raises(ValueError, match=r"b\.txt is in train_files of one corpus and valid"):
    load(folder, (1.0, 1.0), data={"validation_files": held_out})


def test_corpora_that_hold_out_documents_share_no_file(folder: Path) -> None:
  whole = str(folder / "[abc].txt")
  both: dict[str, Any] = {"train_files": (str(folder / "b.txt"), whole), "weights": (1.0, 1.0)}
  settings: dict[str, Any] = {"sequence_length": 32, "tokenizer": "byte", "prefetch_batches": 0}
  with pytest.raises(ValueError, match=r"b\.txt is in two corpora, '.*/b\.txt' and '.*abc\].txt'"):
    load_data(DataConfig(**both, **settings), folder, seed=3, batch_size=4)
  held_out = tuple(str(folder / f"{letter}_held_out.txt") for letter in "ab")
  config = DataConfig(**both, **settings, validation_files=held_out)
  data = load_data(config, folder, seed=3, batch_size=4)
  assert list(data.train_rows.values()) == [60, 115]
  data.close()


def test_the_mean_evaluation() -> None:
  one = Evaluation(2.0, 0.5, 1.0, {0: 2.0, 16: 1.0})
  other = Evaluation(4.0, 0.1, 3.0, {0: 5.0})
  mean = Evaluation.mean({"a": one, "b": other}, (3.0, 1.0))
  assert mean.loss == pytest.approx(2.5)
  assert mean.accuracy == pytest.approx(0.4)
  assert mean.bits_per_byte == pytest.approx(1.5)
  assert mean.loss_by_position == pytest.approx({0: 2.75, 16: 1.0})
  assert mean.to_dict()["eval_loss_by_corpus"] == {"a": 2.0, "b": 4.0}
  assert "eval_loss_by_corpus" not in one.to_dict()
