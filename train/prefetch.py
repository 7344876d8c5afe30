"""Prefetching batch iterator that reports a stalled input pipeline."""

import dataclasses
import queue
import threading
import time

from absl import logging

from train.data.config import DataConfig
from train.data.pipeline import Batch, Data
from train.errors import TrainingError

# The pipeline's thread ends in this time, unless the pipeline hangs.
_CLOSE_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Taken:
  """A batch as the loop took it.

  Attributes:
    rows: this process's rows of it.
    index: its number in the run's order of batches, from 0.
    waited: seconds that the step waited for it.
  """

  rows: Batch
  index: int
  waited: float


class Batches:
  """This process's rows of the global batches, from a position on; close it after use.

  A thread asks the pipeline, so that a wait can be measured and given up.

  Args:
    config: when a wait is worth a warning, and when it is an error.
    data: whose training batches to read.
    position: number of the first batch in the run's order.

  Attributes:
    position: number of the next batch. With the config it determines the batches that follow, for
      any number of processes.
  """

  def __init__(self, config: DataConfig, data: Data, *, position: int) -> None:
    self._config = config
    self.position = position
    self._batches = iter(data.train)
    self._batches.set_state({"next_index": position})
    # True asks for a batch, False ends the thread.
    self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
    self._answers: queue.SimpleQueue[Batch | Exception] = queue.SimpleQueue()
    # A daemon: a pipeline that hangs must not keep the process from ending.
    self._thread = threading.Thread(target=self._read, name="batches", daemon=True)
    self._thread.start()

  def take(self) -> Taken:
    """The next batch.

    Raises:
      TrainingError: it took longer than config.data.stall_error_seconds.
    """
    start = time.perf_counter()
    self._requests.put(True)
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

  def close(self) -> None:
    """Ends the threads of the pipeline and closes its files."""
    self._requests.put(False)
    self._thread.join(_CLOSE_SECONDS)

  def _patience(self, waited: float) -> float:
    """Seconds until the next warning about a wait, or the error."""
    limit = self._config.stall_error_seconds - waited
    return max(0.0, min(self._config.stall_warning_seconds, limit))

  def _complain(self, waited: float) -> None:
    state = f"The input pipeline has stalled: {waited:.0f} s without batch {self.position}."
    limit = self._config.stall_error_seconds
    if waited >= limit:
      raise TrainingError(f"{state} The limit is config.data.stall_error_seconds, {limit} s.")
    logging.warning("%s At %s s it is an error.", state, limit)

  def _read(self) -> None:
    while self._requests.get():
      try:
        self._answers.put(next(self._batches))
      except Exception as error:
        self._answers.put(error)
    self._batches.close()
