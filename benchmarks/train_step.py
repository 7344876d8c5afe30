r"""A whole training step, DGA beside dense attention, on one GPU or on several.

    ./workspace bench train_step --lengths=8192 --config.batch_size=3 --config.model.remat=none
    ./workspace bench train_step --lengths=32768,131072
    NCCL_NVLS_ENABLE=0 ./workspace bench train_step --meshes=one,fsdp --lengths=32768 \
      --config.batch_size=2 --profile

The trainer's own step (train/step.py) of --config on random tokens, each row one document
(config.data.max_documents=1), for which dense attention is cuDNN's. Every program first takes
--steps steps from the same initial state on the same batches: their losses are compared. Then the
programs of a length and mesh take turns, a step each, on one state, which fits where two would
not: milliseconds of a step are the median, lowest and highest of --rounds such steps, each waited
for.

MFU counts 6 operations a weight and token and those of the attention that a method needs itself,
recomputation not; see `dga_jax.model.flops_per_token`. Memory is the compiled program's. Traffic is
what the compiled program sends, and what the first GPU's NVLink counters say of a step. With
--profile a further step says what time NCCL's kernels take, and how much of it nothing hides.

Meshes: "one" GPU; all of them along "fsdp", or along "context", in whose place dense attention,
which cannot split sequences, gets "tensor"; "config" takes config.mesh. --micro_batches=4 lets one
GPU take the batch of four in four pieces.

Compiling for one GPU can be done ahead, on a machine without it (see benchmarks/attention.py), for
DGA alone: cuDNN's kernels are chosen on the device.
"""

import dataclasses
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from tqdm import tqdm

from benchmarks import _aot_gpu
from benchmarks._collectives import nvlink_received, take_profile
from benchmarks.timing import environment
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
_ATTENTION = flags.DEFINE_list("attention", ["dense", "dga"], "attention kinds")
_MESHES = flags.DEFINE_list("meshes", ["one"], "one, fsdp, context or config")
_STEPS = flags.DEFINE_integer("steps", 2, "steps from the initial state, for the losses", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "timed steps of each program", 1)
_MICRO_BATCHES = flags.DEFINE_integer(
  "micro_batches", None, "pieces in which one GPU takes a batch that it cannot hold at once", 1
)
_PROFILE = flags.DEFINE_bool("profile", False, "profile one more step of each program")
_KERNELS = flags.DEFINE_integer("kernels", 12, "kernels to list of a profile")
_COMPILE_TO = flags.DEFINE_string("compile_to", None, "compile DGA into this folder, and stop")
_COMPILED = flags.DEFINE_string("compiled", None, "folder of what --compile_to compiled")

_HEAD = (
  "| L | mesh | attention | ms a step | lowest to highest | tokens/s a GPU | MFU | times dense |"
  " efficiency | GB a GPU | losses |\n| " + " | ".join(["---"] * 11) + " |"
)
_INITIAL: dict[Any, Callable[[], TrainState]] = {}
_KERNELS_OF = {"cuDNN": "__cudnn$", "Mosaic GPU": "mosaic_gpu", "Triton": "__gpu$xla.gpu.triton"}


@dataclasses.dataclass
class _Program:
  """A compiled step, and what is measured of it."""

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
    """Tokens per second and device."""
    tokens = self.config.batch_size * self.config.data.sequence_length
    return tokens / statistics.median(self.seconds) / self.devices


def main(argv: list[str]) -> None:
  """Prints a row for every length, mesh and attention kind."""
  del argv
  if _COMPILE_TO.value is not None:
    _compile_ahead()
    return
  print(environment(), flush=True)
  for length in map(int, _LENGTHS.value):
    alone: dict[str, _Program] = {}
    for name in _MESHES.value:
      programs = {kind: _compile(_config(length, kind, name), name) for kind in _ATTENTION.value}
      for kind, program in programs.items():
        _take_losses(kind, program)
      received, state = _take_times(programs)
      if name == "one":
        alone = programs
      print(f"\n{_HEAD}", flush=True)
      for kind, program in programs.items():
        print(_row(kind, name, program, programs.get("dense"), alone.get(kind)), flush=True)
      for kind, program in programs.items():
        _tell_traffic(kind, program, received[kind])
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
    raise ValueError(f"--meshes has {mesh!r}; it must be of {', '.join(shapes)}.")
  pieces = config.grad_accumulation
  if mesh == "one" and _MICRO_BATCHES.value is not None:
    pieces = _MICRO_BATCHES.value
  return dataclasses.replace(
    config,
    mesh=shapes[mesh],
    grad_accumulation=pieces,
    model=dataclasses.replace(config.model, attention=attention),
    data=dataclasses.replace(config.data, sequence_length=length, max_documents=1),
  )


def _compile(config: TrainConfig, mesh_name: str) -> _Program:
  devices = jax.devices()[:1] if mesh_name == "one" else jax.devices()
  mesh = make_mesh(config.mesh, devices)
  functions = make_functions(config, mesh)
  start = time.perf_counter()
  if _COMPILED.value is not None and config.model.attention == "dga" and mesh.size == 1:
    step, how = _aot_gpu.load(_ahead_path(_COMPILED.value, config)), "loaded"
  else:
    step, how = lower_step(config, functions).compile(), "compiled"
  text = _text(step)
  counts = {name: text.count(f'custom_call_target="{part}') for name, part in _KERNELS_OF.items()}
  shape = {axis: size for axis, size in mesh.shape.items() if size > 1}
  print(
    f"{config.model.attention}, L={config.data.sequence_length}, batch {config.batch_size} in "
    f"{config.grad_accumulation}, remat {config.model.remat}, mesh {shape or 'of one'}: {how} in "
    f"{time.perf_counter() - start:.0f} s; kernels in the program: "
    f"{', '.join(f'{n} of {name}' for name, n in counts.items())}",
    flush=True,
  )
  expected = {"dense": "cuDNN", "dga": "Mosaic GPU"}.get(config.model.attention)
  if expected and not counts[expected]:
    print(f"NOTE: {config.model.attention} does not use {expected} here.", flush=True)
  if again := len(re.findall(r"^\s+%\S+\.remat\d* = ", text, re.MULTILINE)):
    print(f"NOTE: memory is short: XLA computes {again} operations again, remat aside.", flush=True)
  return _Program(config, functions, step, text)


def _text(step: Any) -> str:
  try:
    return step.as_text() or ""
  except RuntimeError:  # A program that was loaded may not tell.
    return ""


def _initial_state(program: _Program) -> TrainState:
  """The same for all lengths and attention kinds, so that it is compiled once for a mesh."""
  key = tuple(program.functions.mesh.shape.items())
  return _INITIAL.setdefault(key, program.functions.init)()


def _take_losses(kind: str, program: _Program) -> None:
  """The first steps, which are not timed."""
  state = _initial_state(program)
  for step in tqdm(range(_STEPS.value), desc=f"{kind}: losses", leave=False, disable=None):
    state, scalars = program.step(state, _batch(program, step))
    program.losses.append(float(scalars["loss"]))
  print(f"{kind}: losses {', '.join(f'{loss:.6f}' for loss in program.losses)}", flush=True)


def _take_times(programs: dict[str, _Program]) -> tuple[dict[str, float | None], TrainState]:
  """Times the programs in turn; bytes that a step received over NVLink, and the last state.

  Where their meshes differ each takes all its turns at once: to move the state takes longer than
  a step.
  """
  state = _initial_state(next(iter(programs.values())))
  received: dict[str, float | None] = {}
  turns = [(number, kind) for number in range(_ROUNDS.value) for kind in programs]
  if len({program.functions.mesh for program in programs.values()}) > 1:
    turns = [(number, kind) for kind in programs for number in range(_ROUNDS.value)]
  for number, kind in tqdm(turns, desc="steps", leave=False, disable=None):
    program = programs[kind]
    state = jax.device_put(state, program.functions.shardings)
    batch = jax.block_until_ready(_batch(program, number))
    before = nvlink_received() if number == 0 and program.devices > 1 else None
    jax.block_until_ready(state)
    start = time.perf_counter()
    state, scalars = program.step(state, batch)
    jax.block_until_ready((state, scalars))
    program.seconds.append(time.perf_counter() - start)
    if number == 0:
      after = None if before is None else nvlink_received()
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
    print(f"{kind}: no profile: {error}", flush=True)
  else:
    print(
      f"{kind}, one profiled step: GPU busy {1e3 * profile.busy:.1f} ms, in collectives "
      f"{1e3 * profile.collectives:.1f} ms, of which nothing hides {1e3 * profile.exposed:.1f} ms"
    )
    for name, seconds in list(profile.kernels.items())[: _KERNELS.value]:
      print(f"  {1e3 * seconds:8.2f} ms  {name[:110]}", flush=True)
  return results[0][0]


def _batch(program: _Program, step: int) -> Batch:
  """Random tokens, the same for all programs of a length and batch size."""
  config = program.config
  shape = (config.batch_size, config.data.sequence_length + 1)
  rng = np.random.default_rng((config.seed, step))
  tokens = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
  batch: Batch = program.functions.place(
    {
      "inputs": tokens[:, :-1],
      "targets": tokens[:, 1:],
      "segment_ids": np.ones_like(tokens[:, 1:]),
      "loss_mask": np.ones_like(tokens[:, 1:], bool),
    }
  )
  return batch


def _row(
  kind: str, mesh: str, program: _Program, dense: _Program | None, alone: _Program | None
) -> str:
  config, L = program.config, program.config.data.sequence_length
  ms = [1e3 * x for x in sorted(program.seconds)]
  peak = peak_flops(config.model.dtype) / len(jax.devices())
  used = program.rate * flops_per_token(config.model, L) / peak
  faster = f"{program.rate / dense.rate:.2f}" if dense else ""
  efficiency = f"{program.rate / alone.rate:.1%}" if alone else ""
  analysis = program.step.memory_analysis()
  gigabytes = f"{analysis.peak_memory_in_bytes / 1e9:.1f}" if analysis else "?"
  if (most := memory().get("device_memory_bytes")) is not None:
    gigabytes += f" (process so far {most / 1e9:.1f})"
  losses = ", ".join(f"{loss:.6f}" for loss in program.losses)
  if alone and alone is not program:
    apart = max(abs(a / b - 1) for a, b in zip(program.losses, alone.losses, strict=True))
    losses += f" (one GPU's but for {apart:.1e})"
  return (
    f"| {L} | {mesh} of {program.devices} | {kind} | {statistics.median(ms):.1f} | {ms[0]:.1f} to "
    f"{ms[-1]:.1f} | {program.rate:.0f} | {used:.1%} | {faster} | {efficiency} | {gigabytes} | "
    f"{losses} |"
  )


def _tell_traffic(kind: str, program: _Program, received: float | None) -> None:
  if program.devices == 1:
    return
  totals = by_kind(read_collectives(program.text))
  predicted = sum(size for _, size in totals.values())
  counted = "not told" if received is None else f"{received / 1e9:.3f} GB"
  print(
    f"{kind}: to each GPU in a step {predicted / 1e9:.3f} GB by the program, {counted} by NVLink's "
    f"counters; {', '.join(f'{n} {name} {x / 1e9:.3f} GB' for name, (n, x) in totals.items())}",
    flush=True,
  )


def _ahead_path(folder: str, config: TrainConfig) -> Path:
  batch = f"B{config.batch_size}in{config.grad_accumulation}"
  sizes = f"L{config.data.sequence_length}_{batch}_{config.model.remat}"
  return Path(folder) / f"train_step_{sizes}_chunk{config.loss_chunk}"


def _compile_ahead() -> None:
  for length in tqdm(_LENGTHS.value, desc="compiling", disable=None):
    config = _config(int(length), "dga", "one")
    functions = make_functions(config, make_mesh(config.mesh, [_aot_gpu.h100()]))
    compiled = lower_step(config, functions).compile()
    analysis = compiled.memory_analysis()
    print(f"L={length}: {analysis.peak_memory_in_bytes / 1e9:.1f} GB", flush=True)
    _aot_gpu.store(_ahead_path(_COMPILE_TO.value, config), compiled)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
