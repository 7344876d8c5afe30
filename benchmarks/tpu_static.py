"""Scheduled bundles of DGA's TPU kernels and of JAX's splash attention: static counts, no times.

    ./workspace test-aot -k none          # once: installs the compiler
    ./workspace bench tpu_static --chips=v5e,v6e --lengths=32768,131072

    ./workspace bench tpu_static --group_size=126 --focal_per_block=2 --sink_tokens=4 \
      --local_window=8

Settings: batch 1, 32 query heads, 8 KV heads, bfloat16, streaming selection; by default m = 16 and
γ = 0.1.

Both programs are compiled for a chip without the hardware. libtpu dumps the schedule of each kernel
in bundles; a core issues one bundle a cycle when nothing stalls. The benchmark multiplies the
bundles of each part of a kernel (grid step, key tile, query tile) by the number of times that the
part runs at this length. All of DGA's kernels are counted, with merging, masked tiles and window.

The baseline is causal splash attention in tiles of 1024 x 2048, the best of the tiles that were
tried. It is compiled at 8K, because the schedule of a tile does not depend on the length. Its grid
steps that compute no attention are counted too.

The column "rest" is XLA's own estimate, in cycles, of the operations outside kernels. Most of them
transpose arrays to heads first, which both programs need.

Schedules contain neither memory latency nor copies that no computation hides. A ratio of bundles
is not a ratio of times.
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax import Array
from tqdm import tqdm

from benchmarks._aot_tpu import CHIPS, compile_for_tpu
from benchmarks._block_flags import block_config
from benchmarks._bundles import libtpu_flags, read_schedules, Schedule
from benchmarks._tpu_kernel_counts import dga_counts, KernelCount, splash_counts
from dga_jax import dynamic_group_attention

_CHIPS = flags.DEFINE_list("chips", list(CHIPS), "chips to compile for")
_LENGTHS = flags.DEFINE_list("lengths", ["32768", "131072"], "sequence lengths")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "head dim")
_PROGRAM = flags.DEFINE_string(
  "program", None, "internal: compile the program that this JSON object describes, in a subprocess"
)

H, N = 32, 8
SPLASH_TILES = (1024, 2048, 512)  # queries, keys, and keys of an inner step
SPLASH_LENGTH = 8192  # Sequence length of the compiled splash program.


@dataclasses.dataclass(frozen=True)
class Program:
  """A program that one subprocess compiles: splash attention or DGA at one length and head dim."""

  chip: str
  L: int
  D: int
  splash: bool


def main(argv: list[str]) -> None:
  """Prints a table with two rows for each chip and length."""
  del argv
  if _PROGRAM.value is not None:
    print(_compile(Program(**json.loads(_PROGRAM.value))))
    return
  print(f"jax {jax.__version__}; static schedules, no times; head dim {_HEAD_DIM.value}")
  print("| chip, length | pass | splash | DGA | merging alone | ratio | rest: splash, DGA |")
  print("| --- | --- | --- | --- | --- | --- | --- |")
  lengths = [int(L) for L in _LENGTHS.value]
  D = _HEAD_DIM.value
  programs = []
  for chip in _CHIPS.value:
    programs.append(Program(chip, SPLASH_LENGTH, D, splash=True))
    programs += [Program(chip, L, D, splash=False) for L in lengths]
  for program in tqdm(programs, desc="programs", disable=None):
    schedules, rest = _compile_in_subprocess(program)
    if program.splash:
      splash_schedules, splash_rest = schedules, rest / program.L
      continue
    splash = _totals(splash_schedules, splash_counts(program.L, H, N, SPLASH_TILES))
    dga = _totals(
      schedules, dga_counts(program.chip, program.L, (H, N, N), D, block_config("streaming"))
    )
    for row in _rows(program, splash, dga, (splash_rest * program.L, rest)):
      tqdm.write(row)


def _rows(
  program: Program, splash: dict[str, float], dga: dict[str, float], rest: tuple[float, float]
) -> list[str]:
  rows = []
  for name, passes in (("forward", ["forward"]), ("forward + backward", ["forward", "backward"])):
    splash_sum, dga_sum = (sum(x[p] for p in passes) for x in (splash, dga))
    merging = sum(dga[f"{p} merging"] for p in passes)
    rest_column = ", ".join(f"{x / 1e6:.1f}" for x in rest) if len(passes) > 1 else ""
    rows.append(
      f"| {program.chip}, {program.L // 1024}K | {name} | {splash_sum / 1e6:.1f} | "
      f"{dga_sum / 1e6:.1f} | {merging / 1e6:.2f} | {dga_sum / splash_sum:.3f} | {rest_column} |"
    )
  return rows


def _compile_in_subprocess(program: Program) -> tuple[dict[str, Schedule], float]:
  """Compiles in a subprocess, because libtpu reads its flags once per process.

  Returns:
    The schedules of the kernels, and the estimated cycles of the operations outside kernels.
  """
  with tempfile.TemporaryDirectory() as folder:
    flags_ = libtpu_flags(pathlib.Path(folder))
    done = subprocess.run(
      [sys.executable, "-m", "benchmarks.tpu_static", *sys.argv[1:], _program_flag(program)],
      env=os.environ | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags_},
      capture_output=True,
      text=True,
      check=False,
    )
    if done.returncode:
      raise RuntimeError(f"{program} failed:\n{done.stderr[-4000:]}")
    schedules = read_schedules(pathlib.Path(folder))
  return schedules, float(done.stdout.splitlines()[-1])


def _program_flag(program: Program) -> str:
  return f"--program={json.dumps(vars(program))}"


def _compile(program: Program) -> float:
  """Compiles both passes; returns XLA's estimated cycles of the operations outside kernels."""
  shapes = [
    jax.ShapeDtypeStruct((1, program.L, heads, program.D), jnp.bfloat16) for heads in (H, N, N, H)
  ]
  attend = _splash(program) if program.splash else _dga

  def both(query: Array, key: Array, value: Array, dout: Array) -> Any:
    out, pull = jax.vjp(attend, query, key, value)
    return out, pull(dout)

  text = compile_for_tpu(both, *shapes, chip=program.chip).as_text()
  assert text is not None  # A compiled TPU program has a text.
  cycles = [int(x) for x in re.findall(r'estimated_cycles":"(\d+)"', text)]
  # Operations without an estimate have −1, written as an unsigned integer.
  return float(sum(x for x in cycles if x < 2**62))


def _dga(query: Array, key: Array, value: Array) -> Array:
  config = block_config("streaming")
  return dynamic_group_attention(query, key, value, config=config, implementation="mosaic_tpu")


def _splash(program: Program) -> Callable[..., Array]:
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  q, kv, compute = SPLASH_TILES
  sizes = kernels.BlockSizes(
    block_q=q,
    block_kv=kv,
    block_kv_compute=compute,
    block_q_dkv=q,
    block_kv_dkv=kv,
    block_kv_dkv_compute=compute,
    block_q_dq=q,
    block_kv_dq=kv,
  )

  def attend(query: Array, key: Array, value: Array) -> Array:
    mask = masks.MultiHeadMask([masks.CausalMask((program.L, program.L)) for _ in range(H)])
    kernel = kernels.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    scaled = query * jnp.asarray(program.D**-0.5, query.dtype)
    out = kernel(*(x[0].transpose(1, 0, 2) for x in (scaled, key, value)))
    return out.transpose(1, 0, 2)[None]

  return attend


def _totals(schedules: dict[str, Schedule], counts: list[KernelCount]) -> dict[str, float]:
  """Bundles of the forward and the backward pass, and of the merging kernels in each.

  Raises:
    ValueError: a count has no kernel, or a kernel has no count.
  """
  totals = dict.fromkeys(("forward", "backward", "forward merging", "backward merging"), 0.0)
  uncounted = dict(schedules)
  for count in counts:
    names = [name for name in uncounted if count.kernel in name]
    if not names:
      raise ValueError(f"no kernel of {sorted(uncounted)} has {count.kernel!r} in its name")
    for name in names:
      bundles = count.bundles(uncounted.pop(name))
      totals[count.direction] += bundles
      if count.is_merge:
        totals[f"{count.direction} merging"] += bundles
  if uncounted:
    raise ValueError(f"kernels without a KernelCount: {sorted(uncounted)}")
  return totals


if __name__ == "__main__":
  app.run(main)
