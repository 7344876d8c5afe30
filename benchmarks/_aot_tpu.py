"""Ahead-of-time compilation for TPUs on a machine without a TPU. Needs libtpu (`jax[tpu]`)."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU generation as a compilation target.

  Attributes:
    topology: name of the smallest topology that libtpu compiles for.
    kind: JAX's `device_kind` of the chip.
    cores: TensorCores that one program runs on.
  """

  topology: str
  kind: str
  cores: int = 1


CHIPS = {
  "v5e": Chip("v5e:2x2", "TPU v5 lite"),
  "v5p": Chip("v5p:2x2x1", "TPU v5", cores=2),
  "v6e": Chip("v6e:2x2", "TPU v6 lite"),
  "tpu7x": Chip("tpu7x:2x2x1", "TPU7x"),
}


def abstract_mesh(kind: str = "TPU v5 lite", *, cores: int = 1, devices: int = 1) -> AbstractMesh:
  """An abstract mesh of TPUs with one axis named "heads", for compiling without the hardware."""
  device = AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
  return AbstractMesh((devices,), ("heads",), axis_types=(AxisType.Auto,), abstract_device=device)


def topology_devices(chip: str = "v5e") -> Sequence[jax.Device]:
  """The devices of the topology description of a chip in CHIPS."""
  # By default libtpu queries the metadata server of a TPU host and allows one process per host.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
  topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology)
  return topology.devices


def compile_for_tpu(
  function: Callable[..., Any], *args: Any, chip: str = "v5e", **jit_options: Any
) -> jax.stages.Compiled:
  """Compiles a function for one TPU chip.

  The compiler's error is raised when a kernel needs more VMEM than the chip has.

  Args:
    function: the function to compile.
    args: arrays or `jax.ShapeDtypeStruct`s with the shapes and dtypes of its arguments.
    chip: a name in CHIPS.
    jit_options: keyword arguments of `jax.jit`, for example donate_argnums.
  """
  sharding = SingleDeviceSharding(topology_devices(chip)[0])
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
  with jax.sharding.use_abstract_mesh(abstract_mesh(CHIPS[chip].kind, cores=CHIPS[chip].cores)):
    lowered = jax.jit(function, **jit_options).trace(*shapes).lower(lowering_platforms=("tpu",))
  return lowered.compile()
