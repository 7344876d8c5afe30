"""Timing on an accelerator: as `benchmarks.timing`, with calls queued and inputs per contender."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.timing import Times


@dataclasses.dataclass(frozen=True)
class Contender:
  """A compiled function and what draws its inputs from a random key."""

  run: Callable[..., Any]
  draw: Callable[[jax.Array], tuple[Any, ...]]


def compare[Name](
  contenders: dict[Name, Contender], *, rounds: int, repeats: int, seed: int
) -> tuple[dict[Name, Times], dict[Name, str]]:
  """Times every contender once a round, each time on new random inputs.

  A sample is `repeats` calls queued one after the other, divided by their number, so that the
  host's part hides behind the device's.

  Returns:
    Seconds of one call by name, and by name why a contender does not run here.
  """
  samples: dict[Name, list[float]] = {}
  refused: dict[Name, str] = {}
  for name, contender in contenders.items():
    try:
      jax.block_until_ready(contender.run(*contender.draw(jax.random.key(seed))))
      samples[name] = []
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as reason:
      refused[name] = (str(reason).splitlines() or [type(reason).__name__])[0]
  for number in range(rounds):
    for name, times in samples.items():
      inputs = contenders[name].draw(jax.random.key(seed + 1 + number))
      jax.block_until_ready(inputs)
      start = time.perf_counter()
      for _ in range(repeats):
        out = contenders[name].run(*inputs)
      jax.block_until_ready(out)
      times.append((time.perf_counter() - start) / repeats)
      del out, inputs
  timings = {name: Times.of(times) for name, times in samples.items()}
  return timings, refused
