"""Training runs of several real processes on one machine, for tests with real signals."""

import dataclasses
import multiprocessing
import multiprocessing.process
import os
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

# A single-threaded server imports every module once and forks the processes, because imports take
# most of the time of a short run.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["train.main", "train.setup"])
# Without these flags the order of sums on a GPU varies, and XLA selects kernels by timing at each
# start.
GPU_ENVIRONMENT = {
  "XLA_FLAGS": "--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false"
  " --xla_gpu_autotune_level=0",
  "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  "NCCL_NVLS_ENABLE": "0",
}


@dataclasses.dataclass(frozen=True)
class Trainer:
  """One process of a run.

  Attributes:
    process: the process.
    log: file of its output.
  """

  process: multiprocessing.process.BaseProcess
  log: Path

  def send(self, number: int) -> None:
    """Sends a signal, unless the process has ended."""
    if self.process.is_alive() and self.process.pid is not None:
      os.kill(self.process.pid, number)

  def wait(self, timeout: float = 180) -> int:
    """Waits for the process to end; returns the exit status, or -N after signal N.

    Raises:
      TimeoutError: the process did not end in time. It is then killed.
    """
    self.process.join(timeout)
    if self.process.exitcode is None:
      self.process.kill()
      raise TimeoutError(f"A process did not end in {timeout} s:\n{self.output()}")
    return self.process.exitcode

  def wait_for_last_words(self, pattern: str) -> None:
    """Waits for a sentence of the filter of standard error, which ends after the process.

    Raises:
      TimeoutError: no output matched the regular expression in time.
    """
    deadline = time.monotonic() + 30
    while not re.search(pattern, self.output()):
      if time.monotonic() > deadline:
        raise TimeoutError(f"The output does not match {pattern}:\n{self.output()}")
      time.sleep(0.01)

  def output(self) -> str:
    """The output of the process so far."""
    return self.log.read_text()


@dataclasses.dataclass(frozen=True)
class Fleet:
  """Starts runs of one config.

  Attributes:
    config_file: value of --config.
    cache: folder of JAX's compilation cache.
    on_gpus: whether each process has a GPU of its own. Otherwise each has a simulated device.
  """

  config_file: Path
  cache: str
  on_gpus: bool = False

  def start(
    self,
    workdir: Path,
    num_processes: int,
    *overrides: str,
    process_overrides: Sequence[str] | None = None,
  ) -> list[Trainer]:
    """Starts the processes of a run, each with one device.

    Args:
      workdir: folder of the run. The logs are beside this folder.
      num_processes: number of processes. A single process has no coordinator.
      *overrides: flags of all processes.
      process_overrides: an additional flag for each process, or "".
    """
    port = free_port()
    trainers = []
    for index in range(num_processes):
      arguments = ["train.main", f"--config={self.config_file}", f"--workdir={workdir}"]
      if num_processes > 1:
        arguments += [
          f"--coordinator=127.0.0.1:{port}",
          f"--num_processes={num_processes}",
          f"--process_id={index}",
        ]
      # The last of several equal flags is used.
      arguments += overrides
      if process_overrides is not None and process_overrides[index]:
        arguments.append(process_overrides[index])
      log = workdir.with_suffix(f".{index}.log")
      gpu = index if self.on_gpus else None
      process = _CONTEXT.Process(target=_train, args=(arguments, self.cache, log, gpu))
      process.start()
      trainers.append(Trainer(process, log))
    return trainers

  def run(self, workdir: Path, num_processes: int, *overrides: str) -> None:
    """Runs the processes to their end.

    Raises:
      RuntimeError: a process failed. The message is its output.
    """
    for trainer in self.start(workdir, num_processes, *overrides):
      if trainer.wait():
        raise RuntimeError(trainer.output())


def free_port() -> int:
  """A TCP port on which no process listens."""
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def wait_for_output(trainer: Trainer, text: str, *, timeout: float = 180) -> None:
  """Waits until a process has printed a text.

  Raises:
    TimeoutError: the process ended, or the time expired, without the text.
  """
  deadline = time.monotonic() + timeout
  while not (trainer.log.exists() and text in trainer.output()):
    if time.monotonic() > deadline or trainer.process.exitcode is not None:
      raise TimeoutError(trainer.output())
    time.sleep(0.005)


def wait_for_a_step(trainers: Sequence[Trainer], workdir: Path) -> None:
  """Waits until the processes have taken a step since this start, or all have ended.

  Raises:
    TimeoutError: the processes still run and have taken no step.
  """
  metrics = workdir / "metrics.jsonl"
  before = _size(metrics)
  deadline = time.monotonic() + 180
  # A resumed run first removes the records of the steps that it repeats.
  while any(trainer.process.is_alive() for trainer in trainers) and _size(metrics) <= before:
    before = min(before, _size(metrics))
    if time.monotonic() > deadline:
      raise TimeoutError(trainers[0].output())
    time.sleep(0.005)


def stop_at_random(
  trainers: Sequence[Trainer], workdir: Path, number: int, rng: random.Random, *, span: float
) -> list[Trainer]:
  """Sends a signal to one process or to all, up to `span` seconds after the first step.

  Returns:
    The processes that received the signal.
  """
  wait_for_a_step(trainers, workdir)
  time.sleep(rng.uniform(0, span))
  victims = list(trainers) if rng.random() < 0.3 else [rng.choice(trainers)]
  for victim in victims:
    victim.send(number)
  return victims


def _size(path: Path) -> int:
  return path.stat().st_size if path.exists() else 0


def _train(arguments: list[str], cache: str, log: Path, gpu: int | None) -> None:
  with log.open("w") as file:
    for stream in (sys.stdout, sys.stderr):
      os.dup2(file.fileno(), stream.fileno())
  if gpu is not None:
    os.environ |= {"CUDA_VISIBLE_DEVICES": str(gpu), **GPU_ENVIRONMENT}
  import jax
  from absl import app
  from tqdm import tqdm

  from train import main

  tqdm.set_lock(threading.RLock())  # tqdm's own lock is a system semaphore, which a kill leaks.
  if gpu is None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_disable_most_optimizations", True)
    _share_compiled_functions()
  else:
    jax.config.update("jax_platforms", "cuda")
  jax.config.update("jax_compilation_cache_dir", cache)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  sys.argv = arguments  # Config flags read their overrides from sys.argv.
  app.run(main.main, arguments, flags_parser=main.parse_flags)


def _share_compiled_functions() -> None:
  """Lets process 0 compile for all processes, because their simulated devices are equal.

  By default JAX's cache key contains the process index, which prevents sharing.
  """
  import jax
  from jax._src import cache_key

  cache_key._hash_accelerator_config = lambda *_: None
  jax.config.update("jax_share_binary_between_hosts", True)
