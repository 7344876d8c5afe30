"""Lowering and compiling for TPUs on a machine without one."""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="needs libtpu (no TPU): ./workspace test-aot",
)


def abstract_mesh(kind: str = "TPU v5 lite", *, cores: int = 1, devices: int = 1) -> AbstractMesh:
  """TPUs along one axis "heads"."""
  device = AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
  return AbstractMesh((devices,), ("heads",), axis_types=(AxisType.Auto,), abstract_device=device)


def lower_for_tpu(
  function: Callable[..., Any], *args: Any, device_kind: str = "TPU v5 lite", devices: int = 1
) -> str:
  """The program that XLA gets: kernels are lowered, not yet compiled. Needs no libtpu."""
  return _lower(function, args, abstract_mesh(device_kind, devices=devices)).as_text()


def compile_for_tpu(
  function: Callable[..., Any], *args: Any, chip: str = "v5e", **jit_options: Any
) -> jax.stages.Compiled:
  """The compiled program for one chip; an overflow of VMEM raises."""
  device = _devices(TOPOLOGIES[chip])[0]
  sharding = SingleDeviceSharding(device)
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
  mesh = abstract_mesh(device.device_kind, cores=device.num_cores)
  return _lower(function, args, mesh, **jit_options).compile()


def _lower(
  function: Callable[..., Any], args: Any, mesh: AbstractMesh, **jit_options: Any
) -> jax.stages.Lowered:
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(function, **jit_options).trace(*args).lower(lowering_platforms=("tpu",))


@functools.cache
def _devices(topology: str) -> Any:
  # The library looks for a TPU's host and refuses a second process unless told otherwise.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
  return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
