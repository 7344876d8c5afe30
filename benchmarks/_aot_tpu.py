"""Programs compiled for TPUs on a machine without one. Needs libtpu: `jax[tpu]`."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding


@dataclasses.dataclass(frozen=True)
class Chip:
  """A kind of TPU, described and absent."""

  topology: str  # the smallest that libtpu compiles for
  kind: str
  cores: int = 1  # that one program sees


CHIPS = {
  "v5e": Chip("v5e:2x2", "TPU v5 lite"),
  "v5p": Chip("v5p:2x2x1", "TPU v5", cores=2),
  "v6e": Chip("v6e:2x2", "TPU v6 lite"),
  "tpu7x": Chip("tpu7x:2x2x1", "TPU7x"),
}


def abstract_mesh(kind: str = "TPU v5 lite", *, cores: int = 1, devices: int = 1) -> AbstractMesh:
  """TPUs along one axis "heads"."""
  device = AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
  return AbstractMesh((devices,), ("heads",), axis_types=(AxisType.Auto,), abstract_device=device)


def topology_devices(chip: str = "v5e") -> Sequence[jax.Device]:
  """The devices, absent, of the smallest topology of a chip in CHIPS."""
  # libtpu looks for the host of a TPU, and refuses a second process, unless told otherwise.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
  topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology)
  return topology.devices


def compile_for_tpu(
  function: Callable[..., Any], *args: Any, chip: str = "v5e", **jit_options: Any
) -> jax.stages.Compiled:
  """A program for one chip; raises where a kernel overflows its VMEM.

  Args:
    function: what to compile.
    args: shapes of its arguments.
    chip: a name in CHIPS.
    jit_options: such as donate_argnums.
  """
  sharding = SingleDeviceSharding(topology_devices(chip)[0])
  placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
  with jax.sharding.use_abstract_mesh(abstract_mesh(CHIPS[chip].kind, cores=CHIPS[chip].cores)):
    lowered = jax.jit(function, **jit_options).trace(*placed).lower(lowering_platforms=("tpu",))
  return lowered.compile()
