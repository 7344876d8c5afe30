"""Prefetched batches: warnings and errors of a stalled pipeline, and the data position."""

import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from train.config import TrainConfig
from train.data.pipeline import load_data
from train.errors import TrainingError
from train.prefetch import Batches


class Stalling:
  """Yields numbers. The third number waits until `released` is set."""

  def __init__(self, released: threading.Event) -> None:
    self._released = released
    self._next = 0

  def __iter__(self) -> Iterator[Any]:
    return self

  def set_state(self, state: dict[str, int]) -> None:
    self._next = state["next_index"]

  def __next__(self) -> dict[str, Any]:
    if self._next == 2:
      self._released.wait()
    if self._next == 3:
      raise ValueError("The file is gone.")
    self._next += 1
    return {"inputs": np.full((1, 4), self._next - 1)}


def stalling(config: TrainConfig, released: threading.Event, error_seconds: float) -> Batches:
  data: Any = dataclasses.make_dataclass("Data", ["train"])(Stalling(released))
  patience = dataclasses.replace(
    config.data, stall_warning_seconds=0.05, stall_error_seconds=error_seconds
  )
  return Batches(patience, data, position=1)


def test_a_stall_logs_a_warning_and_then_continues(
  config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
  released = threading.Event()
  batches = stalling(config, released, error_seconds=60.0)
  assert batches.take().waited < 10
  threading.Timer(0.3, released.set).start()
  taken = batches.take()
  assert (taken.index, taken.rows["inputs"][0, 0], batches.position) == (2, 2, 3)
  assert 0.25 < taken.waited < 10
  warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
  assert len(warnings) > 1
  assert "stalled: 0 s without batch 2. At 60.0 s it is an error." in warnings[0]
  with pytest.raises(ValueError, match="The file is gone"):
    batches.take()


def test_a_stall_ends_the_run_at_its_limit(config: TrainConfig) -> None:
  batches = stalling(config, threading.Event(), error_seconds=0.2)
  batches.take()
  start = time.monotonic()
  with pytest.raises(TrainingError, match=r"without batch 2\..*stall_error_seconds, 0\.2 s"):
    batches.take()
  assert time.monotonic() - start < 5


def test_the_position_gives_the_next_batch(config: TrainConfig, tmp_path: Any) -> None:
  def data() -> Any:
    return load_data(config.data, tmp_path, seed=config.seed, batch_size=config.batch_size)

  expected = list(itertools.islice(data().train, 5))
  first = Batches(config.data, data(), position=0)
  taken = [first.take() for _ in range(3)]
  second = Batches(config.data, data(), position=first.position)
  taken += [second.take() for _ in range(2)]
  assert [batch.index for batch in taken] == [0, 1, 2, 3, 4]
  for ours, theirs in zip(taken, expected, strict=True):
    np.testing.assert_array_equal(ours.rows["inputs"], theirs["inputs"])
