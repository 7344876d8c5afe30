"""Timing on an accelerator: queued calls, and separate inputs for each program."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.timing import Times


@dataclasses.dataclass(frozen=True)
class TimedProgram:
  """A compiled function, and a function that makes its arguments from a random key."""

  run: Callable[..., Any]
  make_inputs: Callable[[jax.Array], tuple[Any, ...]]


# What a program raises that the device or an implementation cannot run.
_REFUSALS = (AssertionError, NotImplementedError, RuntimeError, ValueError)


def compile_in_threads[Name](
  programs: dict[Name, TimedProgram],
) -> tuple[dict[Name, TimedProgram], dict[Name, str]]:
  """Lowers the jitted programs one after another and compiles them in parallel threads.

  Returns:
    The programs with compiled functions, and the error message of each program that does not
    compile. A program whose function is not jitted stays as it is.
  """
  key = jax.eval_shape(lambda: jax.random.key(0))
  refused: dict[Name, str] = {}
  pending: dict[Name, concurrent.futures.Future[Any]] = {}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for name, program in programs.items():
      if hasattr(program.run, "lower"):
        try:
          lowered = program.run.lower(*jax.eval_shape(program.make_inputs, key))
          pending[name] = pool.submit(lowered.compile)
        except _REFUSALS as reason:
          refused[name] = _first_line(reason)
  for name, future in pending.items():
    error = future.exception()
    if isinstance(error, _REFUSALS):
      refused[name] = _first_line(error)
    elif error is not None:
      raise error
  compiled = {
    name: dataclasses.replace(program, run=pending[name].result()) if name in pending else program
    for name, program in programs.items()
    if name not in refused
  }
  return compiled, refused


def compare[Name](
  programs: dict[Name, TimedProgram], *, rounds: int, repeats: int, seed: int
) -> tuple[dict[Name, Times], dict[Name, str]]:
  """Times the programs in alternating rounds, each round on new random inputs.

  One sample is the time of `repeats` queued calls divided by `repeats`. Queued calls hide the
  host's dispatch time behind the device's work.

  Returns:
    Seconds of one call by name, and the error message of each program that this device cannot run.
  """
  samples: dict[Name, list[float]] = {}
  programs, refused = compile_in_threads(programs)
  for name, program in programs.items():
    try:
      jax.block_until_ready(program.run(*program.make_inputs(jax.random.key(seed))))
      samples[name] = []
    except _REFUSALS as reason:
      refused[name] = _first_line(reason)
  for number in range(rounds):
    for name, times in samples.items():
      inputs = programs[name].make_inputs(jax.random.key(seed + 1 + number))
      jax.block_until_ready(inputs)
      start = time.perf_counter()
      for _ in range(repeats):
        out = programs[name].run(*inputs)
      jax.block_until_ready(out)
      times.append((time.perf_counter() - start) / repeats)
      del out, inputs
  timings = {name: Times.from_samples(times) for name, times in samples.items()}
  return timings, refused


def _first_line(reason: BaseException) -> str:
  return (str(reason).splitlines() or [type(reason).__name__])[0]
