"""Compiles the programs of an engine in parallel threads."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from pallas_kernels.dispatch import find_target

_LONG_PROGRAMS = 4  # Of an engine: two lengths of pieces, log probabilities, decoding.

Progress = Callable[[Sequence["Job"]], Iterable["Job"]]


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to compile.

  Attributes:
    name: of the program.
    function: to trace.
    shapes: of its arguments.
    donate: positions of the arguments whose buffers the program takes over.
    options: of XLA.
  """

  name: str
  function: Callable[..., Any]
  shapes: tuple[Any, ...]
  donate: tuple[int, ...] = ()
  options: dict[str, bool | int] | None = None


def xla_options(job: Job) -> dict[str, bool | int]:
  """The options of a job, and on GPUs a bound on the threads that compile its kernels.

  By default XLA starts a thread, and ptxas in it, on every core for each program. Many programs at
  once would start more processes than the system may allow.
  """
  options = dict(job.options or {})
  if find_target().platform == "gpu":
    threads = max(1, (os.cpu_count() or 1) // _LONG_PROGRAMS)
    options["xla_gpu_force_compilation_parallelism"] = threads
  return options


def compile_jobs(jobs: Sequence[Job], progress: Progress) -> dict[str, Any]:
  """The compiled program of each job, by name.

  Python traces one program after another. XLA compiles each in a thread of its own. After an error
  or Ctrl-C the jobs that have not begun are dropped.

  Args:
    jobs: with different names.
    progress: iterates over the jobs while they finish, for example with a progress bar.
  """
  pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
  try:
    running = {
      job.name: pool.submit(
        jax.jit(job.function, donate_argnums=job.donate).lower(*job.shapes).compile,
        xla_options(job),
      )
      for job in jobs
    }
    return {job.name: running[job.name].result() for job in progress(jobs)}
  finally:
    pool.shutdown(cancel_futures=True)
