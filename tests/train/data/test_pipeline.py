"""Batches: equal for any number of processes, exact resume, each held-out token once."""

import itertools
import pathlib
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from train.data.config import DataConfig, RecallConfig
from train.data.pipeline import Batch, Data, load_data

SHAPES = {"inputs": np.int32, "targets": np.int32, "segment_ids": np.int32, "loss_mask": np.bool_}
RECALL = RecallConfig(4, 2, first_length=16, curriculum_rows=30, num_keys=8, validation_rows=9)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("pipeline")
  rng = np.random.default_rng(0)
  texts = ["".join(rng.choice(list("abc d"), rng.integers(3, 200))) + "." for _ in range(60)]
  (folder / "text.txt").write_text("\0".join(texts))
  return folder


@pytest.fixture(scope="module", params=["text", "recall"])
def config(request: pytest.FixtureRequest, workdir: pathlib.Path) -> DataConfig:
  files = (str(workdir / "text.txt"),)
  return DataConfig(
    request.param, 32, files, tokenizer="byte", max_documents=3, prefetch_batches=2, recall=RECALL
  )


def load(config: DataConfig, workdir: pathlib.Path, **changes: Any) -> Data:
  return load_data(config, workdir, **{"seed": 1, "batch_size": 4, **changes})


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
  assert len(ours) == len(theirs)
  for one, other in zip(ours, theirs, strict=True):
    assert one.keys() == other.keys() == SHAPES.keys()
    for name in SHAPES:
      np.testing.assert_array_equal(one[name], other[name])


def test_batches_have_the_promised_arrays(config: DataConfig, workdir: pathlib.Path) -> None:
  data = load(config, workdir)
  for batch in (next(iter(data.train)), next(iter(data.validation[""]))):
    assert {name: array.dtype for name, array in batch.items()} == SHAPES
    assert {array.shape for array in batch.values()} == {(4, 32)}
    assert batch["inputs"].max() < data.tokenizer.vocab_size
    assert batch["loss_mask"].any()
    assert not batch["loss_mask"][batch["segment_ids"] < 0].any()


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_share_the_global_batches(
  config: DataConfig, workdir: pathlib.Path, process_count: int
) -> None:
  def batches(**processes: int) -> tuple[list[Batch], list[Batch]]:
    data = load(config, workdir, **processes)
    return list(itertools.islice(data.train, 30)), list(data.validation[""])

  parts = [
    batches(process_index=index, process_count=process_count) for index in range(process_count)
  ]
  for kind, whole in enumerate(batches()):
    joined = [
      {name: np.concatenate([part[name] for part in of_all]) for name in SHAPES}
      for of_all in zip(*(part[kind] for part in parts), strict=True)
    ]
    assert_same(joined, whole)


@hypothesis.given(stop=st.integers(0, 40), more=st.integers(1, 10))
@hypothesis.settings(max_examples=15)
def test_a_restored_iterator_goes_on_exactly(
  config: DataConfig, workdir: pathlib.Path, stop: int, more: int
) -> None:
  data = load(config, workdir)
  whole = iter(data.train)
  for _ in range(stop):
    next(whole)
  state = whole.get_state()
  assert state == {"next_index": stop}
  expected = [next(whole) for _ in range(more)]
  resumed = iter(load(config, workdir).train)
  next(resumed)
  resumed.set_state(state)
  assert_same([next(resumed) for _ in range(more)], expected)


def rows_of(batches: list[Batch]) -> list[bytes]:
  """The inputs of each row. All rows of the text differ."""
  return [row.tobytes() for batch in batches for row in batch["inputs"]]


def test_text_comes_once_an_epoch_in_a_new_order(workdir: pathlib.Path) -> None:
  config = DataConfig("text", 32, (str(workdir / "text.txt"),), tokenizer="byte", max_documents=3)
  rows = rows_of(list(itertools.islice(load(config, workdir, batch_size=1).train, 1000)))
  # The first repeated row starts the second epoch.
  epoch = next(index for index, row in enumerate(rows) if row in rows[:index])
  first, second, third = (rows[epoch * n : epoch * (n + 1)] for n in range(3))
  assert sorted(first) == sorted(second) == sorted(third)
  assert len({tuple(first), tuple(second), tuple(third)}) == 3
  reseeded = load(config, workdir, batch_size=1, seed=7).train
  other = rows_of(list(itertools.islice(reseeded, epoch)))
  assert sorted(other) == sorted(first)
  assert other not in (first, second, third)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_held_out_token_counts_once(workdir: pathlib.Path, batch_size: int) -> None:
  config = DataConfig("text", 32, (str(workdir / "text.txt"),), tokenizer="byte", max_documents=3)
  data = load(config, workdir, batch_size=batch_size)
  batches = list(data.validation[""])
  assert_same(batches, list(data.validation[""]))
  texts = (workdir / "text.txt").read_text().split("\0")
  held_out = texts[15::16]
  mask = np.concatenate([batch["loss_mask"] for batch in batches])
  assert len(mask) % batch_size == 0
  targets = np.concatenate([batch["targets"] for batch in batches])[mask]
  end = data.tokenizer.end_id
  assert sorted(targets) == sorted([*"".join(held_out).encode(), *[end] * len(held_out)])


def test_a_batch_that_processes_cannot_share_is_refused(
  config: DataConfig, workdir: pathlib.Path
) -> None:
  with pytest.raises(ValueError, match=r"batch_size is 4; .* processes, which is 3"):
    load(config, workdir, process_count=3)


def test_the_cache_can_lie_elsewhere(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
  config = DataConfig(
    train_files=(str(workdir / "text.txt"),), tokenizer="byte", cache_dir=str(tmp_path / "cache")
  )
  load(config, tmp_path / "workdir")
  assert (tmp_path / "cache").is_dir()
  assert not (tmp_path / "workdir").exists()
