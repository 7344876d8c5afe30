"""Timing in alternating rounds on new random inputs: median, minimum and maximum."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from tqdm import tqdm


class Times(NamedTuple):
  """Seconds of one call over several samples."""

  median: float
  minimum: float
  maximum: float

  @classmethod
  def from_samples(cls, samples: Sequence[float]) -> "Times":
    """The median, minimum and maximum of samples in seconds."""
    return cls(statistics.median(samples), min(samples), max(samples))

  def __str__(self) -> str:
    return f"{self.median * 1e3:.4g} ms ({self.minimum * 1e3:.4g}–{self.maximum * 1e3:.4g})"


def alternate(
  programs: Mapping[str, Callable[..., Any]],
  make_inputs: Callable[[jax.Array], tuple[jax.Array, ...]],
  *,
  repeats: int,
  label: str,
) -> dict[str, Times]:
  """Times programs in alternating rounds. All programs of a round get the same new inputs.

  Args:
    programs: the functions by name. A first call of each, which compiles it, is not timed.
    make_inputs: makes the arguments of every program from a random key.
    repeats: number of timed rounds.
    label: text of the progress bar.
  """
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  make_inputs = jax.jit(make_inputs)
  for run in tqdm(range(repeats + 1), desc=label, leave=False, disable=None):
    inputs = jax.block_until_ready(make_inputs(jax.random.key(run)))
    for name, program in programs.items():
      begin = time.perf_counter()
      jax.block_until_ready(program(*inputs))
      if run > 0:
        seconds[name].append(time.perf_counter() - begin)
  return {name: Times.from_samples(values) for name, values in seconds.items()}


def environment() -> str:
  """The number and kind of the devices and the version of jax, on one line."""
  device = jax.devices()[0]
  return f"{len(jax.devices())} × {device.device_kind} ({device.platform}), jax {jax.__version__}"
