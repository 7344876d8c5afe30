r"""Scheduled bundles of DGA's TPU kernels and of JAX's splash attention: static counts, no times.

    ./workspace test-aot -k none          # once: installs the compiler
    ./workspace bench tpu_static --chips=v5e,v6e --lengths=32768,131072
    ./workspace bench tpu_static --selection=global
    ./workspace bench tpu_static --layer --lengths=32768

    ./workspace bench tpu_static --group_size=126 --focal_per_block=2 --sink_tokens=4 \
      --local_window=8

Settings: batch 1, 32 query heads, 8 KV heads, bfloat16, streaming selection; by default m = 16 and
γ = 0.1. Under global selection no minimum of focal tokens holds, and the key ranges are those of
random inputs (`_tpu_global_counts`).

Both programs are compiled for a chip without the hardware. libtpu dumps the schedule of each kernel
in bundles; a core issues one bundle a cycle when nothing stalls. The benchmark multiplies the
bundles of each part of a kernel (grid step, key tile, query tile) by the number of times that the
part runs at this length. All of DGA's kernels are counted, with selection, merging, masked tiles
and window.

The baseline is causal splash attention in tiles of 1024 x 2048, the best of the tiles that were
tried. Without --layer it is compiled at 8K, because the schedule of a tile does not depend on the
length. Its grid steps that compute no attention are counted too.

The column "rest" is XLA's own estimate, in cycles, of the operations outside kernels, and "copies"
is its part for copies and transpositions of whole arrays. The programs take query, key and value as
arguments, tokens before heads, which the kernels need heads first. With --layer a program is the
attention of a decoder layer of width 4096, with the projections, RoPE and the output product: XLA
then writes the projections heads first.

Schedules contain neither memory latency nor copies that no computation hides. A ratio of bundles
is not a ratio of times.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
from absl import app, flags
from jax import Array
from tqdm import tqdm

from benchmarks._aot_tpu import CHIPS
from benchmarks._block_flags import block_config
from benchmarks._tpu_global_counts import global_counts
from benchmarks._tpu_kernel_counts import dga_counts, splash_counts
from benchmarks._tpu_layers import Attend, AttentionShape, compile_both_passes
from benchmarks._tpu_programs import compile_in_subprocess, Compiled, describe, totals
from dga_jax import DGAConfig, dynamic_group_attention

_CHIPS = flags.DEFINE_list("chips", list(CHIPS), "chips to compile for")
_LENGTHS = flags.DEFINE_list("lengths", ["32768", "131072"], "sequence lengths")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "head dim")
_SELECTION = flags.DEFINE_enum("selection", "streaming", ["streaming", "global"], "of DGA")
_LAYER = flags.DEFINE_bool("layer", False, "compile the attention of a whole decoder layer")
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
  layer: bool


def main(argv: list[str]) -> None:
  """Prints a table with two rows for each chip and length."""
  del argv
  if _PROGRAM.value is not None:
    print(_compile(Program(**json.loads(_PROGRAM.value))))
    return
  print(f"jax {jax.__version__}; static schedules, no times; head dim {_HEAD_DIM.value}")
  print("| chip, length | pass | splash | DGA | selection, merging | ratio | rest | copies |")
  print("| --- | --- | --- | --- | --- | --- | --- | --- |")
  cases = [(chip, int(L)) for chip in _CHIPS.value for L in _LENGTHS.value]
  for chip, L in tqdm(cases, desc="cases", disable=None):
    program = Program(chip, L, _HEAD_DIM.value, splash=False, layer=_LAYER.value)
    for row in _rows(program):
      tqdm.write(row)


@functools.cache
def _compiled(program: Program) -> Compiled:
  return compile_in_subprocess("benchmarks.tpu_static", json.dumps(vars(program)))


def _baseline(program: Program) -> Compiled:
  """Splash attention at the length of a program of DGA."""
  if program.layer:  # Copies of weights do not grow with the length.
    return _compiled(dataclasses.replace(program, splash=True))
  splash = _compiled(dataclasses.replace(program, splash=True, L=SPLASH_LENGTH))
  return splash.scaled(program.L / SPLASH_LENGTH)


def _rows(program: Program) -> list[str]:
  """The two passes of a program and of its baseline."""
  baseline, compiled = _baseline(program), _compiled(program)
  config, heads = _config(), (H, N, N)
  counts = dga_counts if config.selection == "streaming" else global_counts
  splash = totals(baseline, splash_counts(program.L, H, N, SPLASH_TILES))
  dga = totals(compiled, counts(program.chip, program.L, heads, program.D, config))
  both = (baseline, compiled)
  rest, copies = (
    ", ".join(f"{getattr(x, name) / 1e6:.1f}" for x in both) for name in ("rest", "copies")
  )
  rows = []
  for name, passes in (("forward", ["forward"]), ("forward + backward", ["forward", "backward"])):
    splash_sum, dga_sum = (sum(x[p] for p in passes) for x in (splash, dga))
    merging = sum(dga[f"{p} merging"] for p in passes)
    rest_columns = f"{rest} | {copies}" if len(passes) > 1 else " | "
    rows.append(
      f"| {program.chip}, {program.L // 1024}K | {name} | {splash_sum / 1e6:.1f} | "
      f"{dga_sum / 1e6:.1f} | {merging / 1e6:.2f} | {dga_sum / splash_sum:.3f} | {rest_columns} |"
    )
  return rows


def _config() -> DGAConfig:
  return block_config(_SELECTION.value)


def _compile(program: Program) -> str:
  """Compiles both passes of a program; returns what `describe` tells of it."""
  attend = _splash(program) if program.splash else _dga
  shape = AttentionShape(program.L, H, N, program.D)
  return describe(compile_both_passes(attend, shape, chip=program.chip, in_layer=program.layer))


def _dga(query: Array, key: Array, value: Array) -> Array:
  return dynamic_group_attention(query, key, value, config=_config(), implementation="mosaic_tpu")


def _splash(program: Program) -> Attend:
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


if __name__ == "__main__":
  app.run(main)
