"""Which device a computation is for, so that its kernels can be chosen while tracing."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

# Compute capability by what a device's kind contains, for devices that are described and absent.
_CAPABILITIES = {
  "B200": 10.0,
  "H200": 9.0,
  "H100": 9.0,
  "L40": 8.9,
  "L4": 8.9,
  "A10": 8.6,
  "A100": 8.0,
  "T4": 7.5,
  "V100": 7.0,
}


class Target(NamedTuple):
  """A kind of device."""

  platform: str  # "cpu", "gpu" or "tpu"
  kind: str
  capability: float | None  # compute capability of an NVIDIA GPU, None elsewhere or if unknown

  def __str__(self) -> str:
    return f"{self.kind} ({self.platform})"

  @property
  def runs_triton(self) -> bool:
    """Whether Triton kernels run on it: an NVIDIA GPU, Ampere or newer."""
    return (self.capability or 0) >= 8.0


class _Needs(NamedTuple):
  """What kernels run on."""

  met_by: Callable[[Target], bool]
  device: str


_NEEDS = {
  "triton": _Needs(lambda target: target.runs_triton, "an Ampere or newer GPU"),
  "mosaic_tpu": _Needs(lambda target: target.platform == "tpu", "a TPU"),
}


def choose(implementation: str | None, refusals: Mapping[str, str | None], *arrays: Any) -> str:
  """The implementation that an op takes for these arrays; "xla" serves any device.

  Args:
    implementation: a name, or None for the op's first kernels that can compute the call.
    refusals: for the op's kernels in the order in which they are tried, why they cannot compute
      the call whatever the device; None where they can.

  Raises:
    ValueError: if the implementation is unknown.
    NotImplementedError: if it is named and cannot; the message says why.
  """
  names = (*refusals, "xla")
  if implementation not in (None, *names):
    raise ValueError(f"implementation is {implementation!r}; it must be None or one of {names}.")
  target = find_target(*arrays)
  for name in names if implementation is None else (implementation,):
    reason = refusals.get(name)
    if reason is None and name in refusals and not _NEEDS[name].met_by(target):
      reason = f"{name} runs on {_NEEDS[name].device}, and this call is for {target}"
    if reason is None:
      return name
  raise NotImplementedError(reason)


def triton_refusal(query: Any) -> str | None:
  """Why Triton kernels over tokens of heads cannot take queries [..., D]; None where they can."""
  D = query.shape[-1]
  if D < 16 or D > 256 or D & (D - 1):
    return f"head_dim is {D}; these kernels want a power of two from 16 to 256"
  if query.dtype.name not in ("float16", "bfloat16", "float32"):
    return f"dtype is {query.dtype}; these kernels have float16, bfloat16 and float32"
  return None


def find_target(*arrays: Any) -> Target:
  """The device of a mesh in force, else of the arrays, else the one that jax runs on.

  A mesh may be abstract and name a device that is absent (`jax.sharding.AbstractMesh` with an
  `abstract_device`): programs compiled for it get its kernels.
  """
  mesh = jax.sharding.get_abstract_mesh()
  meshes = [mesh, *(getattr(jax.typeof(x).sharding, "mesh", None) for x in arrays)]
  for found in meshes:
    device = getattr(found, "abstract_device", None)
    if device is not None and device.platform is not None:
      return _target(device.platform, device.device_kind, None)
  for x in arrays:
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
      return _of_device(next(iter(x.devices())))
  default = jax.config.jax_default_device
  if isinstance(default, jax.Device):
    return _of_device(default)
  return _of_device(jax.devices(default)[0])


def _of_device(device: jax.Device) -> Target:
  capability = getattr(device, "compute_capability", None)
  return _target(device.platform, device.device_kind, capability)


def _target(platform: str, kind: str, capability: Any) -> Target:
  platform = "gpu" if platform in ("cuda", "rocm") else platform
  if capability is None and platform == "gpu":
    longest_first = sorted(_CAPABILITIES, key=len, reverse=True)
    capability = next((_CAPABILITIES[name] for name in longest_first if name in kind), None)
  return Target(platform, kind, None if capability is None else float(capability))
