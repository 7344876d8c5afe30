"""The processes of a run: how they find each other, agree, and stop together.

Every process runs the same program on its own devices. What one of them alone can know, a signal
or its own config, becomes known to all through the functions here, at the same step in each.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from train.errors import TrainingError

# A process that has not been heard of for so long is given up, and with it the run.
_HEARTBEAT_SECONDS = 30
_LAST_WORDS_SECONDS = 2
# Reading and tokenising a corpus takes process 0 its time.
_PREPARATION_SECONDS = 24 * 3600
_BARRIERS = itertools.count()  # Each needs another name; all processes come to them in one order.
AUTOMATIC = "auto"


@dataclasses.dataclass(frozen=True)
class ProcessFlags:
  """Which process this one is, as its command line says.

  Attributes:
    coordinator: HOST:PORT of process 0, the same for all; "auto" where the cluster says it all (a
      TPU pod, Slurm, Open MPI); None for a run of one process.
    num_processes: how many there are.
    process_id: number of this one, from 0.
  """

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None

  def __post_init__(self) -> None:
    numbers = (self.num_processes, self.process_id)
    if self.coordinator in (None, AUTOMATIC):
      if numbers != (None, None):
        raise ValueError(
          f"--coordinator is {self.coordinator!r}; --num_processes and --process_id go with the "
          "HOST:PORT of process 0."
        )
      return
    if not re.fullmatch(r"\S+:\d+", self.coordinator or ""):
      raise ValueError(
        f"--coordinator is {self.coordinator!r}; it must be HOST:PORT of process 0, or 'auto'."
      )
    if self.num_processes is None or self.num_processes < 1:
      raise ValueError(f"--num_processes is {self.num_processes}; it must be at least 1.")
    if self.process_id is None or not 0 <= self.process_id < self.num_processes:
      raise ValueError(
        f"--process_id is {self.process_id}; it must be from 0 to {self.num_processes - 1}."
      )


def start(processes: ProcessFlags) -> None:
  """Joins the other processes; to be called before anything asks jax for devices.

  Jax ends the process, with "Deadline Exceeded", if they are not all there in five minutes.

  Raises:
    TrainingError: they cannot find each other, or have unequal numbers of devices.
  """
  if processes.coordinator is None:
    return
  # Its agreement on a step would be disturbed by orbax, which asks it from another thread.
  jax.config.update("jax_enable_preemption_service", False)
  is_automatic = processes.coordinator == AUTOMATIC
  logging.info("Waiting for the other processes of the run, five minutes at most.")
  try:
    jax.distributed.initialize(
      coordinator_address=None if is_automatic else processes.coordinator,
      num_processes=processes.num_processes,
      process_id=processes.process_id,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    raise TrainingError(f"The processes of the run did not find each other: {error}") from error
  _check_devices()
  logging.info(
    "Process %d of %d, with %d of the run's %d devices.",
    jax.process_index(),
    jax.process_count(),
    jax.local_device_count(),
    jax.device_count(),
  )


def is_first() -> bool:
  """Whether this process is the one that writes what a run has one of."""
  return jax.process_index() == 0


@contextlib.contextmanager
def first_process_first(name: str) -> Iterator[None]:
  """What stands inside is done by process 0, then by the others.

  On a shared disk they find done what it did; on disks of their own they do it themselves. What
  fails in process 0 most likely fails in the others too, each of which then says so.

  Raises:
    TrainingError: a process is gone.
  """
  if not is_first():
    _wait_for_all(name)
  try:
    yield
  finally:
    if is_first():
      _wait_for_all(name)


def check_agreement(values: Mapping[str, Any], remedy: str) -> None:
  """Raises the same ValueError in every process if `values` differ between processes.

  Args:
    values: JSON values by name.
    remedy: what to do about a difference, one sentence.

  Raises:
    TrainingError: a process is gone.
  """
  if jax.process_count() == 1:
    return
  text = json.dumps(values, sort_keys=True, default=str).encode()
  if len(set(_gather(hashlib.blake2b(text, digest_size=16).digest()))) == 1:
    return
  size = max(int.from_bytes(size) for size in _gather(len(text).to_bytes(4)))
  values_P = [json.loads(text) for text in _gather(text.ljust(size))]
  raise ValueError(f"{_describe_differences(values_P)} {remedy}")


class StopRequest:
  """SIGTERM, which announces that the machine is taken away: all processes stop at one step.

  In each step every process says whether it was asked to stop, in an array that the devices
  combine; the answer is read one step later, so that nothing waits for it, and is the same
  everywhere.
  """

  def __init__(self) -> None:
    self._asked = False
    self._pending: Bool[Array, ""] | None = None
    self._before: Any = None
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    self._sharding = NamedSharding(mesh, PartitionSpec("all"))
    self._any = jax.jit(
      lambda asked: asked.any(), out_shardings=NamedSharding(mesh, PartitionSpec())
    )

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():  # No other may set a handler.
      self._before = signal.signal(signal.SIGTERM, self._take)
    return self

  def __exit__(self, *_: object) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def agreed(self) -> bool:
    """Whether to stop after this step; to be called once in each, by all processes alike."""
    if jax.process_count() == 1:
      return self._asked
    before = self._pending
    local = np.full(jax.local_device_count(), self._asked)
    self._pending = self._any(jax.make_array_from_process_local_data(self._sharding, local))
    return before is not None and bool(jax.device_get(before))

  def _take(self, number: int, frame: types.FrameType | None) -> None:
    del number, frame
    self._asked = True


def explain(error: Exception) -> str:
  """What to say of a computation that all processes share and that failed in this one."""
  message = str(error)
  shown = message if len(message) <= 400 else f"{message[:200]} ... {message[-200:]}"
  return (
    f"Process {jax.process_index()} stops: a computation that all processes share has failed, "
    f"most likely because one of them is gone; the log of that one says why. ({shown})"
  )


def leave(status: int, message: str) -> NoReturn:
  """Ends this process without waiting for others that may be gone."""
  sys.stdout.flush()
  print(message, file=sys.stderr, flush=True)
  if jax.distributed.is_initialized() and is_first():
    # The connection of the others ends with process 0, and they with it: they may have found the
    # same error, and are to say so first.
    time.sleep(_LAST_WORDS_SECONDS)
  os._exit(status)


@contextlib.contextmanager
def _blaming_others() -> Iterator[None]:
  """Explains what fails between processes."""
  try:
    yield
  except (RuntimeError, ValueError) as error:  # Both come from jax, by transport.
    raise TrainingError(explain(error)) from error


def _wait_for_all(name: str) -> None:
  """Waits for the other processes without their devices, whose transport gives up earlier."""
  with _blaming_others():
    barrier = ocp.multihost.get_barrier_sync_fn()
    barrier(key=f"{name}_{next(_BARRIERS)}", timeout_ms=_PREPARATION_SECONDS * 1000)


def _gather(local: bytes) -> list[bytes]:
  """Every process's bytes, as many from each, in the order of the processes."""
  with _blaming_others():
    gathered_PxN = multihost_utils.process_allgather(np.frombuffer(local, np.uint8))
  return [row_N.tobytes() for row_N in np.asarray(gathered_PxN)]


def _check_devices() -> None:
  counts = [0] * jax.process_count()
  for device in jax.devices():
    counts[device.process_index] += 1
  if len(set(counts)) > 1:
    raise TrainingError(
      f"Every process must have as many devices as the others; they have {counts}."
    )


def _describe_differences(values_P: list[dict[str, Any]]) -> str:
  """Names each entry that differs, with the values of process 0 and of the first that differs."""
  found = []
  for name in sorted(set().union(*values_P)):
    ours = values_P[0].get(name)
    for process, values in enumerate(values_P):
      if values.get(name) != ours:
        found.append(f"{name} is {ours!r} in process 0 and {values.get(name)!r} in {process}")
        break
  return f"The processes of the run disagree: {'; '.join(found)}."
