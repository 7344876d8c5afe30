"""Timing that the tables share: alternating runs, fresh random inputs, medians and spread."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from tqdm import tqdm


class Times(NamedTuple):
  """Seconds of one call."""

  median: float
  least: float
  most: float

  @classmethod
  def of(cls, samples: Sequence[float]) -> "Times":
    """Of some samples."""
    return cls(statistics.median(samples), min(samples), max(samples))

  def __str__(self) -> str:
    return f"{self.median * 1e3:.4g} ms ({self.least * 1e3:.4g}–{self.most * 1e3:.4g})"


def alternate(
  programs: Mapping[str, Callable[..., Any]],
  make_inputs: Callable[[jax.Array], tuple[jax.Array, ...]],
  *,
  repeats: int,
  label: str,
) -> dict[str, Times]:
  """Times programs in turn, each round on the same fresh random inputs.

  Args:
    programs: by name; compiled by a first call that is not timed.
    make_inputs: from a random key.
    repeats: rounds.
    label: of the progress bar.
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
  return {name: Times.of(values) for name, values in seconds.items()}


def environment() -> str:
  """Device and versions, one line."""
  device = jax.devices()[0]
  return f"{len(jax.devices())} × {device.device_kind} ({device.platform}), jax {jax.__version__}"
