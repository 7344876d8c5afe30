"""What GPUs did in a profile, collectives apart from the rest; and what went over NVLink."""

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
  """Seconds of the GPUs over the profiled time, the mean of all of them.

  Attributes:
    busy: any kernel runs.
    collectives: a kernel of NCCL runs.
    exposed: a kernel of NCCL runs and no other.
    kernels: kernels that took longest, by name, with the seconds of each.
  """

  busy: float
  collectives: float
  exposed: float
  kernels: dict[str, float]


def take_profile(run: Callable[[], Any]) -> Profile:
  """Profiles a call to its end.

  Raises:
    RuntimeError: the profile holds no kernels of a GPU.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = options.host_tracer_level = 0
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      jax.block_until_ready(run())
    (path,) = Path(folder).rglob("*.xplane.pb")
    return read_profile(ProfileData.from_file(str(path)))


def read_profile(data: ProfileData) -> Profile:
  """See `take_profile`."""
  devices = [plane for plane in data.planes if plane.name.startswith("/device:GPU:")]
  parts = [part for part in map(_read_device, devices) if part.busy]
  if not parts:
    raise RuntimeError("The profile holds no kernels of a GPU (is CUPTI installed?).")
  kernels: collections.Counter[str] = collections.Counter()
  for part in parts:
    kernels.update({name: seconds / len(parts) for name, seconds in part.kernels.items()})

  def mean(name: str) -> float:
    return sum(getattr(part, name) for part in parts) / len(parts)

  return Profile(mean("busy"), mean("collectives"), mean("exposed"), dict(kernels.most_common()))


def _read_device(plane: Any) -> Profile:
  sent: list[Interval] = []
  computed: list[Interval] = []
  kernels: collections.Counter[str] = collections.Counter()
  for line in plane.lines:
    if not line.name.startswith("Stream"):  # Other lines say the same again, by operation.
      continue
    for event in line.events:
      interval = (event.start_ns, event.start_ns + event.duration_ns)
      (sent if "nccl" in event.name.lower() else computed).append(interval)
      kernels[event.name] += event.duration_ns / 1e9
  busy, other = _length([*sent, *computed]), _length(computed)
  return Profile(busy / 1e9, _length(sent) / 1e9, (busy - other) / 1e9, dict(kernels))


def _length(intervals: Iterable[Interval]) -> float:
  """Of the union."""
  total, end = 0.0, float("-inf")
  for first, last in sorted(intervals):
    total += max(0.0, last - max(first, end))
    end = max(end, last)
  return total


def nvlink_received(device: int = 0) -> float | None:
  """Bytes that a GPU has received over NVLink so far, by its counters; None if they are not told.

  nvidia-smi numbers all GPUs of the host, so CUDA_VISIBLE_DEVICES must not hide some.
  """
  command = ["nvidia-smi", "nvlink", "-gt", "d", "-i", str(device)]
  try:
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
  except (OSError, subprocess.SubprocessError):
    return None
  return nvlink_bytes(told)


def nvlink_bytes(told: str) -> float | None:
  """Sum over the links of what nvidia-smi says, "Link 0: Data Rx: 123 KiB"."""
  found = re.findall(r"Data Rx: (\d+) KiB", told)
  return sum(map(int, found)) * 1024.0 if found else None
