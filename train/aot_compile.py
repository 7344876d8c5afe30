"""Compiles a training step for an absent TPU pod, and reports its memory, traffic and FLOPs."""

import dataclasses
import importlib.util
import os
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dga_jax.model import flops_per_token, parameter_count
from dga_jax.sharding import make_mesh
from train.config import TrainConfig
from train.hlo_collectives import by_kind, Collective, read_collectives
from train.init_from import find_initial
from train.sharding import batch_sharding, shapes_on
from train.step import Functions, make_functions

# Bytes of memory of one chip (Google Cloud's documentation of each), and devices of a chip: each
# half of a TPU7x is a device.
_CHIPS = {
  "TPU v4": (32e9, 1),
  "TPU v5 lite": (16e9, 1),
  "TPU v5": (95e9, 1),
  "TPU v6 lite": (32e9, 1),
  "TPU7x": (192e9, 2),
}
_SPARE = 0.1  # Share of the memory that a step should leave free.


@dataclasses.dataclass(frozen=True)
class Report:
  """Memory, traffic and FLOPs of a compiled step.

  Attributes:
    device: kind of the chips.
    chips: number of chips.
    devices_per_chip: devices of jax in a chip.
    mesh: sizes of the mesh's axes.
    parameters: of the model.
    tokens: of one step.
    flops: of one step, by formula, without recomputation.
    state_bytes: of parameters and optimizer, per chip.
    peak_bytes: most memory in use, per chip.
    chip_bytes: memory of a chip.
    collectives: of the step.
    seconds: of the compilation.
  """

  device: str
  chips: int
  devices_per_chip: int
  mesh: dict[str, int]
  parameters: int
  tokens: int
  flops: float
  state_bytes: float
  peak_bytes: float
  chip_bytes: float
  collectives: list[Collective]
  seconds: float

  @property
  def fits(self) -> bool:
    """Whether a tenth of the memory stays free."""
    return self.peak_bytes <= (1 - _SPARE) * self.chip_bytes

  def __str__(self) -> str:
    mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1)
    share = self.peak_bytes / self.chip_bytes
    verdict = "fits" if self.fits else f"leaves less than {_SPARE:.0%} free"
    head = (
      f"{self.chips} chips of {self.device}, mesh {mesh or 'of one device'}; "
      f"{self.parameters / 1e9:.2f} billion parameters; compiled in {self.seconds:.0f} s"
    )
    memory = (
      f"memory per chip: {self.peak_bytes / 1e9:.2f} GB of {self.chip_bytes / 1e9:.0f} GB "
      f"({share:.0%}; {verdict}), of which parameters and optimizer {self.state_bytes / 1e9:.2f} GB"
    )
    work = (
      f"model FLOPs (6 per weight and token, and attention): {self.flops:.4g} a step of "
      f"{self.tokens} tokens, {self.flops / self.chips:.4g} a chip"
    )
    lines = [head, memory, work, "moved to each chip in a step:"]
    for kind, (count, size) in sorted(by_kind(self.collectives).items()):
      lines.append(f"  {kind:<18} {count:>6} times {size * self.devices_per_chip / 1e9:>9.3f} GB")
    if any(one.open_ended for one in self.collectives):
      lines.append("  (loops with a trip count that depends on the data count once)")
    return "\n".join(lines)


def compile_step(config: TrainConfig, topology: str) -> tuple[Report, str]:
  """Compiles the training step of a config for a topology.

  Returns:
    The report, and the text of the program.

  Raises:
    ValueError: there is no such topology, or the config does not fit it.
    RuntimeError: there is no compiler for TPUs, or the step takes more memory than a chip has.
  """
  devices = _devices(topology)
  kind = devices[0].device_kind
  chip_bytes, per_chip = _CHIPS[kind]
  mesh = make_mesh(config.mesh, devices)
  if not config.model.head_gates:  # Gates choose heads of a model, which compiling does not need.
    config = find_initial(config, None, devices=len(devices)).config
  functions = make_functions(config, mesh)
  start = time.perf_counter()
  compiled = lower_step(config, functions).compile()
  seconds = time.perf_counter() - start
  memory, text = compiled.memory_analysis(), compiled.as_text()
  if memory is None or text is None:
    raise RuntimeError("The compiler does not report the program's memory.")
  tokens = config.batch_size * config.data.sequence_length
  report = Report(
    device=kind,
    chips=len(devices) // per_chip,
    devices_per_chip=per_chip,
    mesh=dict(mesh.shape),
    parameters=parameter_count(config.model),
    tokens=tokens,
    flops=tokens * flops_per_token(config.model, config.data.sequence_length),
    state_bytes=per_chip * memory.argument_size_in_bytes,
    peak_bytes=per_chip * memory.peak_memory_in_bytes,
    chip_bytes=chip_bytes,
    collectives=read_collectives(text),
    seconds=seconds,
  )
  return report, text


def _devices(topology: str) -> list[jax.Device]:
  if importlib.util.find_spec("libtpu") is None:
    raise RuntimeError(
      "libtpu, which has the compiler for TPUs, is not installed; no TPU is needed: "
      'pip install "jax[tpu]".'
    )
  # Without these settings libtpu queries the machine's TPUs, and refuses to be loaded twice.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
  try:
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  except Exception as error:
    raise ValueError(
      f"--topology={topology} is unknown to the compiler ({str(error).splitlines()[0]}); "
      "examples are v5e:16x16, v5p:8x8x8, v6e:16x16 or tpu7x:4x4x4."
    ) from error
  return list(description.devices)


def lower_step(config: TrainConfig, functions: Functions) -> jax.stages.Lowered:
  """The step for the devices of its mesh, which may be absent, ready to be compiled.

  Raises:
    ValueError: the mesh does not divide the batch.
  """
  mesh = functions.mesh
  rows = mesh.shape["data"] * mesh.shape["fsdp"] * config.grad_accumulation
  if config.batch_size % rows:
    raise ValueError(
      f"config.batch_size is {config.batch_size}; on this mesh with config.grad_accumulation="
      f"{config.grad_accumulation} it must be a multiple of {rows}, or padding rows would be added."
    )
  state = shapes_on(jax.eval_shape(functions.init), functions.shardings)
  dtypes = {
    "inputs": jnp.int32,
    "targets": jnp.int32,
    "segment_ids": jnp.int32,
    "loss_mask": jnp.bool_,
  }
  shape = (config.batch_size, config.data.sequence_length)
  sharding = batch_sharding(mesh)
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()
  }
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return functions.step.lower(state, batch)
