"""The processes of a run: how they connect, agree, and stop together.

Every process runs the same program on its own devices. A signal or an error that one of them has,
or a difference between their configs, becomes known to all through the functions here.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from train import abort_filter, rendezvous
from train.errors import TrainingError
from train.stop_signals import StopSignals

# A process that has not answered for so long counts as lost, and the run ends. Jax sends and checks
# heartbeats in C++ threads, which a busy interpreter does not hold up.
_HEARTBEAT_SECONDS = 8
# All processes have met before jax connects them.
_CONNECT_SECONDS = 60
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

  def meet(self, timeout: float) -> None:
    """Waits until all processes of the run are at the coordinator's address; see `rendezvous`."""
    assert self.coordinator is not None
    assert self.num_processes is not None
    assert self.process_id is not None
    host, _, port = self.coordinator.rpartition(":")
    rendezvous.meet(
      host.strip("[]"),
      int(port),
      process_id=self.process_id,
      num_processes=self.num_processes,
      timeout=timeout,
    )


def start(processes: ProcessFlags, workdir: str | os.PathLike[str], *, timeout: float) -> None:
  """Connects to the other processes; to be called before anything asks jax for devices.

  From then on, where jax finds that a process is gone, this process ends with a sentence.

  Args:
    processes: which process this is.
    workdir: the run's folder, for the messages.
    timeout: seconds to wait for missing processes.

  Raises:
    TrainingError: they cannot find each other, or have unequal numbers of devices.
  """
  if processes.coordinator is None:
    return
  # Its agreement on a step would be disturbed by orbax, which asks it from another thread.
  jax.config.update("jax_enable_preemption_service", False)
  abort_filter.install(workdir)
  is_automatic = processes.coordinator == AUTOMATIC
  logging.info("Waiting for the other processes of the run, %.0f s at most.", timeout)
  if not is_automatic:
    processes.meet(timeout)
  try:
    jax.distributed.initialize(
      coordinator_address=None if is_automatic else processes.coordinator,
      num_processes=processes.num_processes,
      process_id=processes.process_id,
      initialization_timeout=math.ceil(timeout) if is_automatic else _CONNECT_SECONDS,
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
  """Process 0 runs the body first, then the others run it.

  On a shared disk they find the work of process 0; on disks of their own they do it themselves. An
  error of process 0 most likely comes up in the others too, and each of them reports its own.

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


def on_first_process(action: Callable[[], object]) -> None:
  """Process 0 calls `action`, and all processes raise an error where it fails.

  Raises:
    TrainingError: in the other processes, with the text of process 0's OSError or RuntimeError.
  """
  failure: OSError | RuntimeError | None = None
  if is_first():
    try:
      action()
    except (OSError, RuntimeError) as error:
      failure = error
  text = gather_texts("" if failure is None else str(failure))[0]
  if failure is not None:
    raise failure
  if text:
    raise TrainingError(text)


def gather_texts(text: str) -> list[str]:
  """Every process's text, in the order of the processes.

  Raises:
    TrainingError: a process is gone.
  """
  if jax.process_count() == 1:
    return [text]
  content = text.encode(errors="backslashreplace")
  size = max(1, *(int.from_bytes(size) for size in _gather(len(content).to_bytes(4))))
  return [padded.rstrip(b"\0").decode() for padded in _gather(content.ljust(size, b"\0"))]


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
  values_P = [json.loads(text) for text in gather_texts(text.decode())]
  raise ValueError(f"{_describe_differences(values_P)} {remedy}")


class StopAgreement:
  """Lets all processes of a run stop after the same step when one of them was sent a signal.

  In each step every process says whether it was asked to stop, in an array that the devices
  combine; the answer is read one step later, so that nothing waits for it, and is the same
  in all processes.

  Args:
    signals: those of this process.
  """

  def __init__(self, signals: StopSignals) -> None:
    self._signals = signals
    self._pending: Bool[Array, ""] | None = None
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    self._sharding = NamedSharding(mesh, PartitionSpec("all"))
    self._any = jax.jit(
      lambda asked: asked.any(), out_shardings=NamedSharding(mesh, PartitionSpec())
    )

  def agreed(self) -> bool:
    """Whether to stop after this step; to be called once in each, by all processes alike."""
    if jax.process_count() == 1:
      return self._signals.asked
    before = self._pending
    local = np.full(jax.local_device_count(), self._signals.asked)
    self._pending = self._any(jax.make_array_from_process_local_data(self._sharding, local))
    return before is not None and bool(jax.device_get(before))


def explain(error: Exception) -> str:
  """The message for a failed computation that all processes share."""
  message = str(error)
  shown = message if len(message) <= 400 else f"{message[:200]} ... {message[-200:]}"
  return (
    f"Process {jax.process_index()} stops: a computation that all processes share has failed, "
    f"most likely because one of them is gone; see the log of that process. ({shown})"
  )


def leave(status: int, message: str) -> NoReturn:
  """Ends this process without waiting for others that may be gone."""
  sys.stdout.flush()
  print(message, file=sys.stderr, flush=True)
  if jax.distributed.is_initialized() and is_first():
    # Jax aborts the others when process 0 ends. They may have the same error, and report it first.
    time.sleep(_LAST_WORDS_SECONDS)
  os._exit(status)


@contextlib.contextmanager
def _blaming_others() -> Iterator[None]:
  """Raises TrainingError for errors of communication between processes."""
  try:
    yield
  except (RuntimeError, ValueError) as error:  # Both come from jax, by transport.
    raise TrainingError(explain(error)) from error


def _wait_for_all(name: str) -> None:
  """Waits for the other processes, not by their devices, whose transport times out earlier."""
  with _blaming_others():
    barrier = ocp.multihost.get_barrier_sync_fn()
    barrier(key=f"{name}_{next(_BARRIERS)}", timeout_ms=_PREPARATION_SECONDS * 1000)


def _gather(local: bytes) -> list[bytes]:
  """Every process's bytes, equally many from each, in the order of the processes."""
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
