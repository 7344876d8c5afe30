"""Schedules of TPU layers whose heads have different settings, against the sum of their parts.

    ./workspace test-aot -k none          # once: installs the compiler
    ./workspace bench tpu_mixed_heads --chips=v5p --lengths=32768 [--layer]

Batch 1, bfloat16. A layer has --full_heads KV heads with causal dense attention, which is splash
attention on a TPU; the other KV heads have blocks of 126 + 2, 4 sinks and 8 raw blocks. "mixed" is
the op with `HeadBudgets`. "full" and "other" are the attention of these heads alone, on arrays of
their own. The table shows both passes: bundles of the kernels, counted as in `tpu_static`, and
XLA's estimated cycles of the operations outside kernels ("rest") and of its copies. With --layer
each program is the attention of a decoder layer, with projections and output product.

A schedule is not a time; see `tpu_static`.
"""

import dataclasses
import json

import jax
from absl import app, flags
from jax import Array
from tqdm import tqdm

from benchmarks._aot_tpu import CHIPS
from benchmarks._tpu_kernel_counts import dga_counts, KernelCount, splash_counts
from benchmarks._tpu_layers import AttentionShape, compile_both_passes
from benchmarks._tpu_programs import compile_in_subprocess, describe, totals
from dga_jax import DGAConfig, dynamic_group_attention, HeadBudgets
from dga_jax.head_budgets import FULL

_CHIPS = flags.DEFINE_list("chips", list(CHIPS), "chips to compile for")
_LENGTHS = flags.DEFINE_list("lengths", ["32768"], "sequence lengths")
_HEADS = flags.DEFINE_integer("heads", 32, "query heads")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 32, "KV heads")
_FULL_HEADS = flags.DEFINE_integer("full_heads", 3, "KV heads with dense attention")
_LAYER = flags.DEFINE_bool("layer", False, "compile the attention of a whole decoder layer")
_PROGRAM = flags.DEFINE_string(
  "program", None, "internal: compile the program that this JSON object describes, in a subprocess"
)

D = 128
OTHER = DGAConfig(
  group_size=126, focal_per_block=2, selection="streaming", sink_tokens=4, local_window=8
)
SPLASH_TILES = (1024, 1024, 1024)  # of `dga_jax.attention.splash`


@dataclasses.dataclass(frozen=True)
class Program:
  """A program that one subprocess compiles: some KV heads with dense attention, some with OTHER."""

  chip: str
  L: int
  full: int
  others: int
  layer: bool

  @property
  def ratio(self) -> int:
    """Query heads of a KV head."""
    return int(_HEADS.value // _KV_HEADS.value)

  def counts(self) -> list[KernelCount]:
    """All kernels of the program."""
    found = []
    if self.full:
      found += splash_counts(self.L, self.full * self.ratio, self.full * self.ratio, SPLASH_TILES)
    if self.others:
      heads = (self.others * self.ratio, self.others, self.others)
      found += dga_counts(self.chip, self.L, heads, D, OTHER)
    return found


def main(argv: list[str]) -> None:
  """Prints a table with four rows for each chip and length."""
  del argv
  if _PROGRAM.value is not None:
    print(_compile(Program(**json.loads(_PROGRAM.value))))
    return
  print(f"jax {jax.__version__}; static schedules, no times; forward + backward; 126 + 2")
  print("| chip, length | heads | kernels | rest | kernels + rest | copies |")
  print("| --- | --- | --- | --- | --- | --- |")
  cases = [(chip, int(L)) for chip in _CHIPS.value for L in _LENGTHS.value]
  for chip, L in tqdm(cases, desc="cases", disable=None):
    for row in _rows(chip, L):
      tqdm.write(row)


def _rows(chip: str, L: int) -> list[str]:
  full, others = _FULL_HEADS.value, _KV_HEADS.value - _FULL_HEADS.value
  kinds = {"full": (full, 0), "other": (0, others), "mixed": (full, others)}
  costs = {
    name: _cost(Program(chip, L, *heads, layer=_LAYER.value)) for name, heads in kinds.items()
  }
  sums = (x + y for x, y in zip(costs["full"], costs["other"], strict=True))
  ratios = [mixed / parts for mixed, parts in zip(costs["mixed"][:3], sums, strict=False)]
  case = f"| {chip}, {L // 1024}K |"
  rows = [
    f"{case} {name} | {' | '.join(f'{x:.1f}' for x in cost)} |" for name, cost in costs.items()
  ]
  return [*rows, f"{case} mixed / sum | {' | '.join(f'{x:.3f}' for x in ratios)} | |"]


def _cost(program: Program) -> list[float]:
  """Millions of bundles or cycles: of the kernels, the rest, both, and the rest's copies."""
  compiled = compile_in_subprocess("benchmarks.tpu_mixed_heads", json.dumps(vars(program)))
  found = totals(compiled, program.counts())
  kernels = found["forward"] + found["backward"]
  costs = (kernels, compiled.rest, kernels + compiled.rest, compiled.copies)
  return [x / 1e6 for x in costs]


def _compile(program: Program) -> str:
  """Compiles both passes of a program; returns what `describe` tells of it."""
  N = program.full + program.others
  budgets = HeadBudgets((FULL, OTHER), ((0,) * program.full + (1,) * program.others,))

  def attend(query: Array, key: Array, value: Array) -> Array:
    return dynamic_group_attention(query, key, value, config=budgets)

  shape = AttentionShape(program.L, N * program.ratio, N, D)
  return describe(compile_both_passes(attend, shape, chip=program.chip, in_layer=program.layer))


if __name__ == "__main__":
  app.run(main)
