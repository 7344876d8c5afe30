"""TPU kernels by their static schedules, beside JAX's splash attention. It is no time.

    ./workspace test-aot -k none          # once: installs the compiler
    ./workspace bench tpu_static --chips=v5e,v6e --lengths=32768,131072

Batch 1, 32 query heads, 8 KV heads, bfloat16, m = 16, importance rate 0.1, no floor, streaming.

Method. Both programs are compiled for a chip that is not there, and libtpu writes each kernel's
schedule: bundles, of which a core issues one a cycle when nothing stalls. Every part of a kernel
(per grid step, per tile, per tile of queries) counts as often as the plan of this length makes it
run. Splash attention is causal, in tiles of 1024 x 2048 (the best of those tried); it is compiled
at 8K, since the schedule of a tile does not know the length, and its grid steps that compute
nothing count what they cost. DGA counts all of its kernels: summaries, edges and window included.
What XLA does beside the kernels in the forward and the backward pass ("rest": mostly laying arrays
out heads first, which both need) is in cycles by XLA's own estimate, which rests on memory traffic.
Neither says what a TPU would take: copies that nothing hides, and memory that is late, are not in a
schedule.
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
from benchmarks._bundles import libtpu_flags, read_schedules, Schedule
from benchmarks._tpu_visits import Counts, dga_counts, splash_counts
from dga_jax import DGAConfig, dynamic_group_attention

_CHIPS = flags.DEFINE_list("chips", list(CHIPS), "chips to compile for")
_LENGTHS = flags.DEFINE_list("lengths", ["32768", "131072"], "sequence lengths")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "head dim")
_ONE = flags.DEFINE_string("one", None, "compile this one program, for the command itself")

H, N = 32, 8
CONFIG = DGAConfig(selection="streaming", min_focal_tokens=0)
SPLASH_TILES = (1024, 2048, 512)  # queries, keys, and keys of an inner step
SPLASH_LENGTH = 8192  # that it is compiled at


@dataclasses.dataclass(frozen=True)
class Program:
  """What one process compiles."""

  chip: str
  L: int
  D: int
  splash: bool


def main(argv: list[str]) -> None:
  """Prints a table."""
  del argv
  if _ONE.value is not None:
    print(_compile(Program(**json.loads(_ONE.value))))
    return
  print(f"jax {jax.__version__}; static schedules, no time; head dim {_HEAD_DIM.value}")
  print("| chip, length | pass | splash | DGA | of it summaries | ratio | rest: splash, DGA |")
  print("| --- | --- | --- | --- | --- | --- | --- |")
  lengths = [int(L) for L in _LENGTHS.value]
  D = _HEAD_DIM.value
  programs = []
  for chip in _CHIPS.value:
    programs.append(Program(chip, SPLASH_LENGTH, D, splash=True))
    programs += [Program(chip, L, D, splash=False) for L in lengths]
  for program in tqdm(programs, desc="programs", disable=None):
    schedules, rest = _in_a_process(program)
    if program.splash:
      peer_schedules, peer_rest = schedules, rest / program.L
      continue
    peer = _totals(peer_schedules, splash_counts(program.L, H, N, SPLASH_TILES))
    own = _totals(schedules, dga_counts(program.chip, program.L, (H, N, N), D, CONFIG))
    for row in _rows(program, peer, own, (peer_rest * program.L, rest)):
      tqdm.write(row)


def _rows(
  program: Program, peer: dict[str, float], own: dict[str, float], rest: tuple[float, float]
) -> list[str]:
  rows = []
  for name, passes in (("forward", ["forward"]), ("forward + backward", ["forward", "backward"])):
    peer_sum, own_sum = (sum(x[p] for p in passes) for x in (peer, own))
    summaries = sum(own[f"{p} summaries"] for p in passes)
    beside = ", ".join(f"{x / 1e6:.1f}" for x in rest) if len(passes) > 1 else ""
    rows.append(
      f"| {program.chip}, {program.L // 1024}K | {name} | {peer_sum / 1e6:.1f} | "
      f"{own_sum / 1e6:.1f} | {summaries / 1e6:.2f} | {own_sum / peer_sum:.3f} | {beside} |"
    )
  return rows


def _in_a_process(program: Program) -> tuple[dict[str, Schedule], float]:
  """libtpu reads its flags once a process."""
  with tempfile.TemporaryDirectory() as folder:
    flags_ = libtpu_flags(pathlib.Path(folder))
    done = subprocess.run(
      [sys.executable, "-m", "benchmarks.tpu_static", "--one", json.dumps(vars(program))],
      env=os.environ | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags_},
      capture_output=True,
      text=True,
      check=False,
    )
    if done.returncode:
      raise RuntimeError(f"{program} failed:\n{done.stderr[-4000:]}")
    schedules = read_schedules(pathlib.Path(folder))
  return schedules, float(done.stdout.splitlines()[-1])


def _compile(program: Program) -> float:
  """Compiles forward and backward pass; returns the estimated cycles of what is no kernel."""
  shapes = [
    jax.ShapeDtypeStruct((1, program.L, heads, program.D), jnp.bfloat16) for heads in (H, N, N, H)
  ]
  attend = _splash(program) if program.splash else _dga

  def both(query: Array, key: Array, value: Array, dout: Array) -> Any:
    out, pull = jax.vjp(attend, query, key, value)
    return out, pull(dout)

  text = compile_for_tpu(both, *shapes, chip=program.chip).as_text()
  cycles = [int(x) for x in re.findall(r'estimated_cycles":"(\d+)"', text)]
  return float(sum(x for x in cycles if x < 2**62))  # −1, written unsigned: no estimate


def _dga(query: Array, key: Array, value: Array) -> Array:
  return dynamic_group_attention(query, key, value, config=CONFIG, implementation="mosaic_tpu")


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


def _totals(schedules: dict[str, Schedule], counts: list[Counts]) -> dict[str, float]:
  """Bundles of each pass, and of its summaries."""
  totals = dict.fromkeys(("forward", "backward", "forward summaries", "backward summaries"), 0.0)
  left = dict(schedules)
  for count in counts:
    names = [name for name in left if count.kernel in name]
    if not names:
      raise ValueError(f"no kernel of {sorted(left)} has {count.kernel} in its name")
    for name in names:
      bundles = count.bundles(left.pop(name))
      totals[count.part] += bundles
      if count.is_summary:
        totals[f"{count.part} summaries"] += bundles
  if left:
    raise ValueError(f"nobody counts {sorted(left)}")
  return totals


if __name__ == "__main__":
  app.run(main)
