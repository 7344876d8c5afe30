"""The device that a computation is for, known while it is traced."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

# Compute capability by a part of a device's kind, for devices that are described but absent.
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
  capability: float | None  # compute capability of an NVIDIA GPU; None if unknown or no GPU
  num_cores: int | None  # multiprocessors of a GPU; None if unknown

  def __str__(self) -> str:
    return f"{self.kind} ({self.platform})"

  @property
  def runs_triton(self) -> bool:
    """Whether Triton kernels run on it: an NVIDIA GPU, Ampere or newer."""
    return (self.capability or 0) >= 8.0


_assumed: contextvars.ContextVar[Target | None] = contextvars.ContextVar("assumed", default=None)


@contextlib.contextmanager
def assume_target(target: Target) -> Iterator[None]:
  """Within this context every call is for `target`."""
  token = _assumed.set(target)
  try:
    yield
  finally:
    _assumed.reset(token)


def find_target(*args: Any) -> Target:
  """The device that a call with these arguments is for.

  The first of these that is known: the target of `assume_target`; the device of the mesh in force,
  which may be abstract and name an absent device (`jax.sharding.AbstractMesh` with an
  `abstract_device`); the device of an array's mesh; the device of a concrete array or of a
  `jax.ShapeDtypeStruct` with a sharding; `jax.default_device`; the first device of the default
  backend.

  Args:
    args: pytrees of arrays, shapes and numbers.
  """
  assumed = _assumed.get()
  if assumed is not None:
    return assumed
  arrays = [x for x in jax.tree.leaves(args) if hasattr(x, "shape") and hasattr(x, "dtype")]
  mesh = jax.sharding.get_abstract_mesh()
  for found in (mesh, *(getattr(jax.typeof(x).sharding, "mesh", None) for x in arrays)):
    device = getattr(found, "abstract_device", None)
    if device is not None and device.platform is not None:
      return _of_kind(device.platform, device.device_kind, device.num_cores)
  for x in arrays:
    sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    if sharding is not None:
      return _of_device(min(sharding.device_set, key=lambda device: device.id))
  default = jax.config.jax_default_device
  if isinstance(default, jax.Device):
    return _of_device(default)
  return _of_device(jax.devices(default)[0])


def _of_device(device: jax.Device) -> Target:
  kind = device.device_kind
  platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
  capability = None
  if platform == "gpu":
    try:
      capability = float(device.compute_capability)
    except (AttributeError, ValueError):  # a described GPU has none, an AMD GPU's is no number
      capability = _listed_capability(kind)
  return Target(platform, kind, capability, getattr(device, "core_count", None))


def _of_kind(platform: str, kind: str, num_cores: int | None) -> Target:
  """A device that a mesh describes, completed by what JAX knows of such a device here."""
  here = next((device for device in jax.devices() if device.device_kind == kind), None)
  if here is not None:
    found = _of_device(here)
    return found._replace(num_cores=num_cores or found.num_cores)
  platform = "gpu" if platform in ("cuda", "rocm") else platform
  return Target(platform, kind, _listed_capability(kind) if platform == "gpu" else None, num_cores)


def _listed_capability(kind: str) -> float | None:
  longest_first = sorted(_CAPABILITIES, key=len, reverse=True)
  return next((_CAPABILITIES[name] for name in longest_first if name in kind), None)
