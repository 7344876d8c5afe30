"""The batches of a run, one after another; says so when they do not come."""

import dataclasses
import queue
import threading
import time
from collections.abc import Iterator

from absl import logging

from train.data.config import DataConfig
from train.data.pipeline import Batch, Data
from train.errors import TrainingError


@dataclasses.dataclass(frozen=True)
class Taken:
  """A batch as it was taken.

  Attributes:
    rows: this process's rows of it.
    index: its number in the run's order of global batches, from 0.
    waited: seconds that the step waited for it.
  """

  rows: Batch
  index: int
  waited: float


class Batches:
  """This process's rows of the global batches, from a position on.

  A thread asks the pipeline, so that a wait can be measured and given up.

  Args:
    config: when a wait is worth a warning, and when it is an error.
    data: whose training batches to read.
    position: batches that the run has taken before.

  Attributes:
    position: batches taken so far; with the config it says which come next, in any number of
      processes.
  """

  def __init__(self, config: DataConfig, data: Data, *, position: int) -> None:
    self._config = config
    self.position = position
    batches = iter(data.train)
    batches.set_state({"next_index": position})
    self._requests: queue.SimpleQueue[None] = queue.SimpleQueue()
    self._answers: queue.SimpleQueue[Batch | Exception] = queue.SimpleQueue()
    # A daemon: a pipeline that hangs must not keep the process from ending.
    threading.Thread(target=self._read, args=(batches,), daemon=True).start()

  def take(self) -> Taken:
    """The next batch.

    Raises:
      TrainingError: it took longer than config.data.stall_error_seconds.
    """
    start = time.perf_counter()
    self._requests.put(None)
    while True:
      waited = time.perf_counter() - start
      try:
        answer = self._answers.get(timeout=self._patience(waited))
        break
      except queue.Empty:
        self._complain(time.perf_counter() - start)
    if isinstance(answer, Exception):
      raise answer
    self.position += 1
    return Taken(answer, self.position - 1, time.perf_counter() - start)

  def _patience(self, waited: float) -> float:
    """Seconds until there is something to say about a wait."""
    limit = self._config.stall_error_seconds - waited
    return max(0.0, min(self._config.stall_warning_seconds, limit))

  def _complain(self, waited: float) -> None:
    state = f"The input pipeline has stalled: {waited:.0f} s without batch {self.position}."
    limit = self._config.stall_error_seconds
    if waited >= limit:
      raise TrainingError(f"{state} The limit is config.data.stall_error_seconds, {limit} s.")
    logging.warning("%s At %s s it is an error.", state, limit)

  def _read(self, batches: Iterator[Batch]) -> None:
    while True:
      self._requests.get()
      try:
        self._answers.put(next(batches))
      except Exception as error:
        self._answers.put(error)
