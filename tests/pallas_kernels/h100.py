"""Lowering and compiling for an H100 on a machine without one."""

import functools
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

_TARGET = pathlib.Path(__file__).with_name("h100_target.txtpb")

needs_cuda_compiler = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None,
  reason="needs jax-cuda13-plugin and jax-cuda13-pjrt (no GPU)",
)


def lower_for_h100(function: Callable[..., Any], *args: Any, devices: int = 1) -> str:
  """The program that XLA gets: kernels are lowered, not yet compiled."""
  with jax.sharding.use_abstract_mesh(abstract_mesh(devices)):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@functools.cache
def _h100() -> Any:
  return topologies.get_topology_desc(
    platform="cuda",
    topology_name="h100",
    topology="1x1x1",
    target_config=_TARGET.read_text(),
  ).devices[0]


def compile_for_h100(function: Callable[..., Any], *args: Any) -> Any:
  """Machine code for sm_90a; raises where a kernel overflows shared memory."""
  sharding = SingleDeviceSharding(_h100())
  placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
  with jax.sharding.use_abstract_mesh(abstract_mesh()):
    lowered = jax.jit(function).lower(*placed)
  return lowered.compile()


def abstract_mesh(devices: int = 1) -> AbstractMesh:
  """H100s, described and absent, along one axis "heads"."""
  device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
  return AbstractMesh((devices,), ("heads",), axis_types=(AxisType.Auto,), abstract_device=device)
