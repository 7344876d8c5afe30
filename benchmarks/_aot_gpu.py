"""Programs compiled for an H100 on a machine without one, and run on one later.

Compiling these kernels takes minutes. Done ahead, the time of a GPU goes into measuring alone. The
machine that compiles needs jax-cuda13-plugin and jax-cuda13-pjrt of the version that runs.
"""

import functools
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

_TARGET = pathlib.Path(__file__).with_name("h100_target.txtpb")


def abstract_mesh(devices: int = 1) -> AbstractMesh:
  """H100s, described and absent, along one axis "heads"."""
  device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
  return AbstractMesh((devices,), ("heads",), axis_types=(AxisType.Auto,), abstract_device=device)


@functools.cache
def h100() -> Any:
  """One, absent."""
  return topologies.get_topology_desc(
    platform="cuda",
    topology_name="h100",
    topology="1x1x1",
    target_config=_TARGET.read_text(),
  ).devices[0]


def compile_for_h100(function: Callable[..., Any], *args: Any) -> Any:
  """Machine code for sm_90a; raises where a kernel overflows shared memory."""
  sharding = SingleDeviceSharding(h100())
  placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
  with jax.sharding.use_abstract_mesh(abstract_mesh()):
    lowered = jax.jit(function).lower(*placed)
  return lowered.compile()


def prepare(
  name: str,
  run: Callable[..., Any],
  draw: Callable[..., Any],
  *,
  drawn: str,
  folder: str | None,
  compile_now: bool,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """A contender and what draws its inputs from a random key, ready to run.

  Args:
    name: of the contender's file in the folder.
    run: the contender.
    draw: draws its arguments.
    drawn: name of the drawing program's file, which contenders may share.
    folder: of compiled programs; None compiles for the device at hand when first called.
    compile_now: compiles what the folder lacks, instead of loading from it.
  """
  if folder is None:
    return jax.jit(run), jax.jit(draw)
  run_path, draw_path = pathlib.Path(folder) / name, pathlib.Path(folder) / drawn
  if not compile_now:
    return load(run_path), load(draw_path)
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype)
  with jax.sharding.use_abstract_mesh(abstract_mesh()):
    inputs = jax.eval_shape(draw, key)
  for path, function, args in ((run_path, run, inputs), (draw_path, draw, (key,))):
    if not path.exists():
      store(path, compile_for_h100(function, *args))
  return run, draw


def store(path: pathlib.Path, compiled: Any) -> None:
  """Writes a compiled program."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(pickle.dumps(serialize(compiled)))


def load(path: pathlib.Path) -> Callable[..., Any]:
  """The program of `store`, on this machine's GPU. Load what you have written yourself alone."""
  from jax.experimental.mosaic.gpu import core  # its programs look for the library this names

  del core
  program: Callable[..., Any] = deserialize_and_load(*pickle.loads(path.read_bytes()))
  return program
