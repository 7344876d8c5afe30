"""Speed of training: step time, tokens per second, model FLOPs utilisation (MFU); and memory."""

import collections
import dataclasses
import resource
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from absl import logging

# Dense peak of the matrix units in bf16 (float16 for V100 and T4), FLOP/s of one device, by the
# start of its `device_kind`. TPU: the "System architecture" pages of Google Cloud's documentation.
# GPU: NVIDIA's data sheets of each product, SXM variant where there are several, without sparsity.
_PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 2307e12,
  "NVIDIA B200": 2250e12,
  "NVIDIA H200": 989e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100": 989e12,
  "NVIDIA A100": 312e12,
  "NVIDIA L4": 121e12,
  "Tesla V100": 125e12,
  "Tesla T4": 65e12,
}

# The median of these ignores single steps that an evaluation or a compilation delays.
_RECENT_STEPS = 32


@dataclasses.dataclass(frozen=True)
class Speed:
  """Attributes: median seconds of a recent step; tokens per second and MFU that follow from it."""

  step_seconds: float
  tokens_per_second: float
  mfu: float


class StepTimer:
  """Measures steps between calls of `lap`.

  Args:
    tokens_per_step: positions of a step's batch.
    flops_per_token: by formula, see `dga_jax.model.flops_per_token`.
    peak_flops: of all devices together.
  """

  def __init__(self, *, tokens_per_step: int, flops_per_token: float, peak_flops: float) -> None:
    self._tokens_per_step = tokens_per_step
    self._flops_per_token = flops_per_token
    self._peak_flops = peak_flops
    self._seconds: collections.deque[float] = collections.deque(maxlen=_RECENT_STEPS)
    self._last: float | None = None

  def lap(self) -> None:
    """Ends the measurement of a step and begins the next."""
    now = time.perf_counter()
    if self._last is not None:
      self._seconds.append(now - self._last)
    self._last = now

  def pause(self) -> None:
    """Excludes the time until the next lap, in which no step runs."""
    self._last = None

  def speed(self) -> Speed | None:
    """The median speed of recent steps; None before two laps."""
    if not self._seconds:
      return None
    seconds = statistics.median(self._seconds)
    tokens_per_second = self._tokens_per_step / seconds
    return Speed(
      seconds, tokens_per_second, tokens_per_second * self._flops_per_token / self._peak_flops
    )


def peak_flops(dtype: str) -> float:
  """Peak FLOP/s of all devices of the run together, for the MFU.

  For a device that is not in the table, such as a CPU, a matrix product in `dtype` is timed.
  """
  devices = jax.devices()
  kind = devices[0].device_kind
  for prefix in sorted(_PEAK_FLOPS, key=len, reverse=True):
    if kind.startswith(prefix):
      return _PEAK_FLOPS[prefix] * len(devices)
  measured = _measure_flops(dtype)
  logging.info(
    "MFU is relative to a measured %.3g FLOP/s (a product of matrices in %s): the peak of '%s' is "
    "not known.",
    measured,
    dtype,
    kind,
  )
  # Devices that are simulated on one CPU share it.
  return measured if devices[0].platform == "cpu" else measured * len(devices)


def memory() -> dict[str, int]:
  """Peak bytes so far: of this process on the host, and of its fullest device if that reports."""
  # Kilobytes on Linux, bytes on macOS.
  unit = 1 if sys.platform == "darwin" else 1024
  host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  on_devices = [
    stats["peak_bytes_in_use"]
    for device in jax.local_devices()
    if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats
  ]
  of_devices = {"device_memory_bytes": max(on_devices)} if on_devices else {}
  return {"host_memory_bytes": host, **of_devices}


def _measure_flops(dtype: str, size: int = 1024, repeats: int = 8) -> float:
  """The best of some products of square matrices on the first device."""
  square = jnp.ones((size, size), dtype)
  product = jax.jit(jnp.matmul).lower(square, square).compile()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(product(square, square))
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)
