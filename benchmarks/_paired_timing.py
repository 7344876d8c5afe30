"""Timing on an accelerator: queued calls, and separate inputs for each program."""

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
  refused: dict[Name, str] = {}
  for name, program in programs.items():
    try:
      jax.block_until_ready(program.run(*program.make_inputs(jax.random.key(seed))))
      samples[name] = []
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as reason:
      refused[name] = (str(reason).splitlines() or [type(reason).__name__])[0]
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
