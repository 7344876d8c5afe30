"""GPU time in NCCL collectives and in other kernels from a profile, and NVLink byte counters."""

import collections
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

type Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Profile:
  """GPU seconds within a profile, averaged over the GPUs.

  Attributes:
    busy: time in which at least one kernel runs.
    collectives: time in which at least one NCCL kernel runs.
    exposed: time in which NCCL kernels run and no other kernel does.
    kernels: seconds by kernel name, longest first.
  """

  busy: float
  collectives: float
  exposed: float
  kernels: dict[str, float]


def take_profile(run: Callable[[], Any]) -> Profile:
  """Profiles one call, including the device work that it starts.

  Raises:
    RuntimeError: the profile contains no GPU kernels.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = options.host_tracer_level = 0
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      jax.block_until_ready(run())
    (path,) = Path(folder).rglob("*.xplane.pb")
    return read_profile(ProfileData.from_file(str(path)))


def read_profile(data: ProfileData) -> Profile:
  """Averages the kernel times of all GPUs in a profile.

  Raises:
    RuntimeError: the profile contains no GPU kernels.
  """
  planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU:")]
  gpus = [gpu for gpu in map(_read_device, planes) if gpu.busy]
  if not gpus:
    raise RuntimeError("The profile contains no GPU kernels. Check that CUPTI is installed.")
  kernels: collections.Counter[str] = collections.Counter()
  for gpu in gpus:
    kernels.update({name: seconds / len(gpus) for name, seconds in gpu.kernels.items()})

  def mean(name: str) -> float:
    return sum(getattr(gpu, name) for gpu in gpus) / len(gpus)

  return Profile(mean("busy"), mean("collectives"), mean("exposed"), dict(kernels.most_common()))


def _read_device(plane: Any) -> Profile:
  nccl: list[Interval] = []
  compute: list[Interval] = []
  kernels: collections.Counter[str] = collections.Counter()
  for line in plane.lines:
    if not line.name.startswith("Stream"):  # Other lines repeat the kernels under HLO names.
      continue
    for event in line.events:
      interval = (event.start_ns, event.start_ns + event.duration_ns)
      (nccl if "nccl" in event.name.lower() else compute).append(interval)
      kernels[event.name] += event.duration_ns / 1e9
  busy, computing = _union_length([*nccl, *compute]), _union_length(compute)
  return Profile(busy / 1e9, _union_length(nccl) / 1e9, (busy - computing) / 1e9, dict(kernels))


def _union_length(intervals: Iterable[Interval]) -> float:
  """Length of the union of the intervals."""
  total, end = 0.0, float("-inf")
  for first, last in sorted(intervals):
    total += max(0.0, last - max(first, end))
    end = max(end, last)
  return total


def nvlink_received_bytes() -> float | None:
  """Reads the NVLink counters of nvidia-smi's GPU 0: bytes received since they were last reset.

  Returns:
    None if nvidia-smi is missing, fails or prints no counters.
  """
  command = ["nvidia-smi", "nvlink", "-gt", "d", "-i", "0"]
  try:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
  except (OSError, subprocess.SubprocessError):
    return None
  return parse_nvlink_bytes(done.stdout)


def parse_nvlink_bytes(text: str) -> float | None:
  """Sums nvidia-smi's lines "Link 0: Data Rx: 123 KiB" over the links; None without such a line."""
  found = re.findall(r"Data Rx: (\d+) KiB", text)
  return sum(map(int, found)) * 1024.0 if found else None
