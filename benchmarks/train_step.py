r"""A whole training step with DGA and with dense attention, on one GPU or several.

    ./workspace bench train_step --lengths=8192 --config.batch_size=3 --config.model.remat=none
    ./workspace bench train_step --lengths=32768,131072
    NCCL_NVLS_ENABLE=0 ./workspace bench train_step --meshes=one,fsdp --lengths=32768 \
      --config.batch_size=2 --profile

The benchmark runs the trainer's step (train/step.py) of --config on random tokens. Each row is one
document (config.data.max_documents=1), so that dense attention uses cuDNN. Every program first runs
--steps steps from the same initial state on the same batches, and prints their losses. Then the
programs of a length and mesh alternate, one step each, on one shared state, because two states may
not fit the memory. The table shows the median, minimum and maximum of --rounds synchronized steps.

MFU counts 6 operations per weight and token plus the operations of the attention method, without
recomputation; see `dga_jax.model.flops_per_token`. Memory is from the memory analysis of the
compiled program. Traffic is read from the compiled program and from the NVLink counters of the
first GPU. --profile profiles one more step and prints the time in NCCL kernels, and the part of
that time in which no other kernel runs.

Meshes: "one" is a single GPU. "fsdp" and "context" split over all GPUs along that axis. Dense
attention cannot split sequences and uses the axis "tensor" in place of "context". "config" uses
config.mesh. --micro_batches=4 splits the batch of the single GPU into four micro-batches.

Programs with DGA for one GPU can be compiled on a machine without a GPU (see
benchmarks/attention.py). Dense programs cannot, because cuDNN selects its kernels on the device.
"""

import dataclasses
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from absl import app, flags
from tqdm import tqdm

from benchmarks import _aot_gpu
from benchmarks._collectives import nvlink_received_bytes, take_profile
from benchmarks.timing import environment
from dga_jax.choices import AttentionName
from dga_jax.model import flops_per_token
from dga_jax.sharding import make_mesh, MeshConfig
from train.aot_compile import lower_step
from train.config import make_config, TrainConfig
from train.flags import define_config_flag, parse_flags
from train.hlo_collectives import by_kind, read_collectives
from train.step import Batch, Functions, make_functions, TrainState
from train.throughput import memory, peak_flops

_CONFIG = define_config_flag("configs/llama_1b3.py")
_LENGTHS = flags.DEFINE_list("lengths", ["8192", "32768"], "sequence lengths")
_ATTENTION = flags.DEFINE_list("attention", ["dense", "dga"], "attention kinds to compare")
_MESHES = flags.DEFINE_list("meshes", ["one"], "meshes to run on: one, fsdp, context, config")
_STEPS = flags.DEFINE_integer(
  "steps", 2, "steps from the initial state whose losses are printed", 1
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "timed steps of each program", 1)
_MICRO_BATCHES = flags.DEFINE_integer(
  "micro_batches", None, "micro-batches of a step on the mesh 'one'; default: the config's", 1
)
_PROFILE = flags.DEFINE_bool("profile", False, "profile one more step of each program")
_KERNELS = flags.DEFINE_integer("kernels", 12, "kernels that --profile lists")

_HEADER = (
  "| L | mesh | attention | ms per step | minimum to maximum | tokens/s per GPU | MFU |"
  " times dense | efficiency | GB per GPU | losses |\n| " + " | ".join(["---"] * 11) + " |"
)
# Makes the initial state, by the shape of the mesh.
_INIT_FUNCTIONS: dict[Any, Callable[[], TrainState]] = {}
# Prefix of the custom-call targets of each kernel library.
_CALL_TARGETS = {"cuDNN": "__cudnn$", "Mosaic GPU": "mosaic_gpu", "Triton": "__gpu$xla.gpu.triton"}


@dataclasses.dataclass
class _Program:
  """A compiled step and its measurements.

  Attributes:
    config: config of the run.
    functions: the trainer's functions for this config and mesh.
    step: the compiled step.
    text: HLO text of the compiled step; "" if a loaded program does not provide it.
    losses: losses of the first steps from the initial state.
    seconds: times of the timed steps.
  """

  config: TrainConfig
  functions: Functions
  step: Any
  text: str
  losses: list[float] = dataclasses.field(default_factory=list)
  seconds: list[float] = dataclasses.field(default_factory=list)

  @property
  def devices(self) -> int:
    return self.functions.mesh.size

  @property
  def rate(self) -> float:
    """Tokens per second per device."""
    tokens = self.config.batch_size * self.config.data.sequence_length
    return tokens / statistics.median(self.seconds) / self.devices


def main(argv: list[str]) -> None:
  """Prints one row for each length, mesh and attention kind."""
  del argv
  if _aot_gpu.COMPILE_TO.value is not None:
    _compile_ahead(_aot_gpu.COMPILE_TO.value)
    return
  print(environment(), flush=True)
  for length in map(int, _LENGTHS.value):
    single_gpu: dict[str, _Program] = {}
    for name in _MESHES.value:
      programs = {kind: _compile(_config(length, kind, name), name) for kind in _ATTENTION.value}
      for kind, program in programs.items():
        _measure_losses(kind, program)
      received, state = _measure_times(programs)
      if name == "one":
        single_gpu = programs
      print(f"\n{_HEADER}", flush=True)
      for kind, program in programs.items():
        print(_row(kind, name, program, programs.get("dense"), single_gpu.get(kind)), flush=True)
      for kind, program in programs.items():
        _print_traffic(kind, program, received[kind])
      if _PROFILE.value:
        _profile(programs, state)
      del state


def _config(length: int, attention: str, mesh: str) -> TrainConfig:
  config = make_config(_CONFIG.value)
  devices = -1
  shapes = {
    "one": MeshConfig(data=1),
    "fsdp": MeshConfig(data=1, fsdp=devices),
    "context": MeshConfig(data=1, **{"tensor" if attention == "dense" else "context": devices}),
    "config": config.mesh,
  }
  if mesh not in shapes:
    raise ValueError(f"--meshes contains {mesh!r}; use one of {', '.join(shapes)}.")
  micro_batches = config.grad_accumulation
  if mesh == "one" and _MICRO_BATCHES.value is not None:
    micro_batches = _MICRO_BATCHES.value
  return dataclasses.replace(
    config,
    mesh=shapes[mesh],
    grad_accumulation=micro_batches,
    model=dataclasses.replace(config.model, attention=cast(AttentionName, attention)),
    data=dataclasses.replace(config.data, sequence_length=length, max_documents=1),
  )


def _compile(config: TrainConfig, mesh_name: str) -> _Program:
  devices = jax.devices()[:1] if mesh_name == "one" else jax.devices()
  mesh = make_mesh(config.mesh, devices)
  functions = make_functions(config, mesh)
  start = time.perf_counter()
  folder = _aot_gpu.COMPILED.value
  if folder is not None and config.model.attention == "dga" and mesh.size == 1:
    step, how = _aot_gpu.load_compiled(_compiled_path(folder, config)), "loaded"
  else:
    step, how = lower_step(config, functions).compile(), "compiled"
  text = _hlo_text(step)
  counts = {
    name: text.count(f'custom_call_target="{prefix}') for name, prefix in _CALL_TARGETS.items()
  }
  shape = {axis: size for axis, size in mesh.shape.items() if size > 1}
  print(
    f"{config.model.attention}, L={config.data.sequence_length}, batch {config.batch_size} in "
    f"{config.grad_accumulation} micro-batches, remat {config.model.remat}, mesh "
    f"{shape or 'of one device'}: {how} in {time.perf_counter() - start:.0f} s; kernel calls: "
    f"{', '.join(f'{name} {n}' for name, n in counts.items())}",
    flush=True,
  )
  expected = {"dense": "cuDNN", "dga": "Mosaic GPU"}.get(config.model.attention)
  if expected and not counts[expected]:
    print(f"NOTE: {config.model.attention} attention does not call {expected} kernels.", flush=True)
  if rematerialized := len(re.findall(r"^\s+%\S+\.remat\d* = ", text, re.MULTILINE)):
    print(
      f"NOTE: XLA rematerializes {rematerialized} operations to save memory, in addition to"
      " config.model.remat.",
      flush=True,
    )
  return _Program(config, functions, step, text)


def _hlo_text(step: Any) -> str:
  try:
    return step.as_text() or ""
  except RuntimeError:  # A program that was loaded from a file may have no text.
    return ""


def _initial_state(program: _Program) -> TrainState:
  """The initial state. Its function is compiled once per mesh for all lengths and kinds."""
  key = tuple(program.functions.mesh.shape.items())
  return _INIT_FUNCTIONS.setdefault(key, program.functions.init)()


def _measure_losses(kind: str, program: _Program) -> None:
  """Runs the first steps, without timing, and stores their losses in the program."""
  state = _initial_state(program)
  for step in tqdm(range(_STEPS.value), desc=f"{kind}: losses", leave=False, disable=None):
    state, scalars = program.step(state, _batch(program, step))
    program.losses.append(float(scalars["loss"]))
  print(f"{kind}: losses {', '.join(f'{loss:.6f}' for loss in program.losses)}", flush=True)


def _measure_times(programs: dict[str, _Program]) -> tuple[dict[str, float | None], TrainState]:
  """Times the programs in alternating rounds and stores the times in the programs.

  Programs on different meshes run all their rounds one after another, because moving the state
  to another mesh takes longer than a step.

  Returns:
    Bytes that the first GPU received over NVLink in the first timed step, and the last state.
  """
  state = _initial_state(next(iter(programs.values())))
  received: dict[str, float | None] = {}
  order = [(number, kind) for number in range(_ROUNDS.value) for kind in programs]
  if len({program.functions.mesh for program in programs.values()}) > 1:
    order = [(number, kind) for kind in programs for number in range(_ROUNDS.value)]
  for number, kind in tqdm(order, desc="steps", leave=False, disable=None):
    program = programs[kind]
    state = jax.device_put(state, program.functions.shardings)
    batch = jax.block_until_ready(_batch(program, number))
    before = nvlink_received_bytes() if number == 0 and program.devices > 1 else None
    jax.block_until_ready(state)
    start = time.perf_counter()
    state, scalars = program.step(state, batch)
    jax.block_until_ready((state, scalars))
    program.seconds.append(time.perf_counter() - start)
    if number == 0:
      after = None if before is None else nvlink_received_bytes()
      received[kind] = None if before is None or after is None else after - before
  return received, state


def _profile(programs: dict[str, _Program], state: TrainState) -> None:
  for kind, program in programs.items():
    state = _profile_one(kind, program, jax.device_put(state, program.functions.shardings))


def _profile_one(kind: str, program: _Program, state: TrainState) -> TrainState:
  batch = jax.block_until_ready((state, _batch(program, 0)))[1]
  results: list[tuple[TrainState, Any]] = []

  def run() -> Any:
    results.append(program.step(state, batch))
    return results[0]

  try:
    profile = take_profile(run)
  except (RuntimeError, ValueError) as error:
    print(f"{kind}: profiling failed: {error}", flush=True)
  else:
    print(
      f"{kind}, one profiled step: GPU busy {1e3 * profile.busy:.1f} ms, collectives "
      f"{1e3 * profile.collectives:.1f} ms, of which exposed {1e3 * profile.exposed:.1f} ms"
    )
    for name, seconds in list(profile.kernels.items())[: _KERNELS.value]:
      print(f"  {1e3 * seconds:8.2f} ms  {name[:110]}", flush=True)
  return results[0][0]


def _batch(program: _Program, step: int) -> Batch:
  """A batch of random tokens. Programs of equal length and batch size get equal batches."""
  config = program.config
  shape = (config.batch_size, config.data.sequence_length + 1)
  rng = np.random.default_rng((config.seed, step))
  tokens = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
  batch: Batch = program.functions.shard_batch(
    {
      "inputs": tokens[:, :-1],
      "targets": tokens[:, 1:],
      "segment_ids": np.ones_like(tokens[:, 1:]),
      "loss_mask": np.ones_like(tokens[:, 1:], bool),
    }
  )
  return batch


def _row(
  kind: str, mesh: str, program: _Program, dense: _Program | None, single_gpu: _Program | None
) -> str:
  config, L = program.config, program.config.data.sequence_length
  ms = [1e3 * x for x in sorted(program.seconds)]
  peak = peak_flops(config.model.dtype) / len(jax.devices())
  mfu = program.rate * flops_per_token(config.model, L) / peak
  speed_up = f"{program.rate / dense.rate:.2f}" if dense else ""
  efficiency = f"{program.rate / single_gpu.rate:.1%}" if single_gpu else ""
  analysis = program.step.memory_analysis()
  gigabytes = f"{analysis.peak_memory_in_bytes / 1e9:.1f}" if analysis else "unknown"
  if (peak_bytes := memory().get("device_memory_bytes")) is not None:
    gigabytes += f" (peak of the process {peak_bytes / 1e9:.1f})"
  losses = ", ".join(f"{loss:.6f}" for loss in program.losses)
  if single_gpu and single_gpu is not program:
    pairs = zip(program.losses, single_gpu.losses, strict=True)
    difference = max(abs(loss / reference - 1) for loss, reference in pairs)
    losses += f" (relative difference to one GPU {difference:.1e})"
  return (
    f"| {L} | {mesh} of {program.devices} | {kind} | {statistics.median(ms):.1f} | {ms[0]:.1f} to "
    f"{ms[-1]:.1f} | {program.rate:.0f} | {mfu:.1%} | {speed_up} | {efficiency} | {gigabytes} | "
    f"{losses} |"
  )


def _print_traffic(kind: str, program: _Program, received: float | None) -> None:
  """Prints the bytes that one GPU receives in a step, from the program and from NVLink."""
  if program.devices == 1:
    return
  totals = by_kind(read_collectives(program.text))
  predicted = sum(size for _, size in totals.values())
  counted = "unknown" if received is None else f"{received / 1e9:.3f} GB"
  print(
    f"{kind}: bytes received by one GPU in a step: {predicted / 1e9:.3f} GB from the program, "
    f"{counted} from NVLink's counters; "
    f"{', '.join(f'{n} {name} {x / 1e9:.3f} GB' for name, (n, x) in totals.items())}",
    flush=True,
  )


def _compiled_path(folder: str, config: TrainConfig) -> Path:
  batch = f"B{config.batch_size}in{config.grad_accumulation}"
  sizes = f"L{config.data.sequence_length}_{batch}_{config.model.remat}"
  return Path(folder) / f"train_step_{sizes}_chunk{config.loss_chunk}"


def _compile_ahead(folder: str) -> None:
  """Compiles the DGA step of each length for one H100 and saves the programs."""
  for length in tqdm(_LENGTHS.value, desc="compiling", disable=None):
    config = _config(int(length), "dga", "one")
    functions = make_functions(config, make_mesh(config.mesh, [_aot_gpu.h100_device()]))
    compiled = lower_step(config, functions).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None  # The compiler for GPUs has it.
    print(f"L={length}: {analysis.peak_memory_in_bytes / 1e9:.1f} GB", flush=True)
    _aot_gpu.save_compiled(_compiled_path(folder, config), compiled)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
