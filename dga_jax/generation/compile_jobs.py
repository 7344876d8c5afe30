"""Compiles the programs of an engine in parallel threads."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

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


def compile_jobs(jobs: Sequence[Job], progress: Progress) -> dict[str, Any]:
  """The compiled program of each job, by name.

  Python traces one program after another. XLA compiles each in a thread of its own.

  Args:
    jobs: with different names.
    progress: iterates over the jobs while they finish, for example with a progress bar.
  """
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    running = {
      job.name: pool.submit(
        jax.jit(job.function, donate_argnums=job.donate).lower(*job.shapes).compile, job.options
      )
      for job in jobs
    }
    return {job.name: running[job.name].result() for job in progress(jobs)}
