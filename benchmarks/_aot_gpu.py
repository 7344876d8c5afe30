"""Ahead-of-time compilation for an H100 on a machine without a GPU.

Compiling the kernels takes minutes. Programs compiled ahead of time let the GPU spend its time on
measurements only. The compiling machine needs the packages jax-cuda13-plugin and jax-cuda13-pjrt in
the version of the machine that runs the programs.
"""

import functools
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import jax
from absl import flags
from jax.experimental import topologies
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

COMPILE_TO = flags.DEFINE_string(
  "compile_to", None, "only compile the programs for an H100, into this folder"
)
COMPILED = flags.DEFINE_string(
  "compiled", None, "load the programs from this folder, which --compile_to wrote"
)

_TARGET = pathlib.Path(__file__).with_name("h100_target.txtpb")


def abstract_mesh(devices: int = 1) -> AbstractMesh:
  """An abstract mesh of H100s with one axis named "heads", for compiling without the hardware."""
  device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
  return AbstractMesh((devices,), ("heads",), axis_types=(AxisType.Auto,), abstract_device=device)


@functools.cache
def h100_device() -> Any:
  """The device of an H100 topology description, for compiling without the hardware."""
  return topologies.get_topology_desc(
    platform="cuda",
    topology_name="h100",
    topology="1x1x1",
    target_config=_TARGET.read_text(),
  ).devices[0]


def compile_for_h100(function: Callable[..., Any], *args: Any) -> Any:
  """Compiles a function to sm_90a machine code.

  The compiler's error is raised when a kernel needs more shared memory than an SM has.

  Args:
    function: the function to compile.
    args: arrays or `jax.ShapeDtypeStruct`s with the shapes and dtypes of its arguments.
  """
  sharding = SingleDeviceSharding(h100_device())
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
  with jax.sharding.use_abstract_mesh(abstract_mesh()):
    lowered = jax.jit(function).lower(*shapes)
  return lowered.compile()


def jit_or_load(
  name: str,
  run: Callable[..., Any],
  make_inputs: Callable[..., Any],
  *,
  inputs_name: str,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Returns callables for a benchmarked function and for the function that makes its inputs.

  With --compile_to, the programs that its folder lacks are compiled and saved. With --compiled,
  they are loaded from its folder. Without either flag, `jax.jit` compiles for the current device.

  Args:
    name: file name of the compiled `run` in the folder.
    run: the benchmarked function.
    make_inputs: returns the arguments of `run` as a tuple, from a random key.
    inputs_name: file name of the compiled `make_inputs`. Several programs may share it.
  """
  folder = COMPILE_TO.value or COMPILED.value
  if folder is None:
    return jax.jit(run), jax.jit(make_inputs)
  run_path, inputs_path = pathlib.Path(folder) / name, pathlib.Path(folder) / inputs_name
  if COMPILE_TO.value is None:
    return load_compiled(run_path), load_compiled(inputs_path)
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype)
  with jax.sharding.use_abstract_mesh(abstract_mesh()):
    inputs = jax.eval_shape(make_inputs, key)
  for path, function, args in ((run_path, run, inputs), (inputs_path, make_inputs, (key,))):
    if not path.exists():
      save_compiled(path, compile_for_h100(function, *args))
  return run, make_inputs


def save_compiled(path: pathlib.Path, compiled: Any) -> None:
  """Writes a compiled program to a file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(pickle.dumps(serialize(compiled)))


def load_compiled(path: pathlib.Path) -> Callable[..., Any]:
  """Loads a program that `save_compiled` wrote, onto this machine's GPU.

  The file is a pickle, so load only files that you wrote yourself.
  """
  # Importing this module sets the path of the library that Mosaic GPU programs load.
  from jax.experimental.mosaic.gpu import core

  del core
  program: Callable[..., Any] = deserialize_and_load(*pickle.loads(path.read_bytes()))
  return program
