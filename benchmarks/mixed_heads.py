"""Attention layers whose heads have different settings, against the sum of their parts, on a GPU.

    ./workspace bench mixed_heads --lengths=8192,32768,131072
    ./workspace bench mixed_heads --heads=9 --kv_heads=3 --head_dim=64 --full_heads=1 --backward

Batch 1, bfloat16. A layer has --full_heads KV heads with causal dense attention; the other KV heads
follow --other. "mixed" is the op with `HeadBudgets`. "full heads" and "other heads" are the
attention of these heads alone, on arrays of their own. The benchmark prints the time of "mixed"
over the sum of the parts. Programs run in alternating rounds on new random inputs; times are
medians with the lowest and the highest round.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags
from jax import Array

from benchmarks._head_settings import SETTINGS
from benchmarks._inputs import Shape
from benchmarks._paired_timing import compare, TimedProgram
from benchmarks.timing import environment
from dga_jax import DGAConfig, dynamic_group_attention, HeadBudgets
from dga_jax.attention.dense import dense_attention
from dga_jax.attention.segments import find_documents
from dga_jax.head_budgets import FULL, SinkWindow

_LENGTHS = flags.DEFINE_list("lengths", ["8192", "32768", "131072"], "sequence lengths")
_HEADS = flags.DEFINE_integer("heads", 32, "query heads")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 32, "KV heads")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "head dim")
_FULL_HEADS = flags.DEFINE_integer("full_heads", 3, "KV heads with dense attention")
_OTHERS = flags.DEFINE_list(
  "other", ["30+2", "126+2", "window"], "settings of the other KV heads, measured one by one"
)
_BACKWARD = flags.DEFINE_bool("backward", False, "time both passes instead of the forward pass")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "samples of each program")
_REPEATS = flags.DEFINE_integer("repeats", 8, "queued calls in one sample")


def main(argv: list[str]) -> None:
  """Prints one table row for each length and setting."""
  del argv
  print(environment())
  print("forward + backward" if _BACKWARD.value else "forward")
  print("| L, other | mixed | full heads | other heads | mixed / sum | all dense |")
  print("| --- | --- | --- | --- | --- | --- |")
  for length in _LENGTHS.value:
    for other in _OTHERS.value:
      print(_row(int(length), other), flush=True)


def _row(length: int, other: str) -> str:
  """Times the programs of one length and setting."""
  shape = Shape(length, _HEADS.value, _KV_HEADS.value, _HEAD_DIM.value)
  timings, refused = compare(
    _programs(shape, _FULL_HEADS.value, SETTINGS[other]),
    rounds=_ROUNDS.value,
    repeats=_REPEATS.value,
    seed=0,
  )
  names = ("mixed", "full heads", "other heads")
  cells = [str(timings[name]) if name in timings else refused[name][:80] for name in names]
  parts = timings["full heads"].median + timings["other heads"].median
  ratio = timings["mixed"].median / parts
  return f"| {length}, {other} | {' | '.join(cells)} | {ratio:.3f} | {timings['all dense']} |"


def _programs(shape: Shape, full: int, other: DGAConfig | SinkWindow) -> dict[str, TimedProgram]:
  """The programs of a layer whose first `full` KV heads are dense."""
  budgets = HeadBudgets((FULL, other), ((0,) * full + (1,) * (shape.N - full),))
  others = HeadBudgets((other,), ((0,) * (shape.N - full),))
  ratio = shape.H // shape.N

  def heads(first: int, last: int, key: Array) -> tuple[Array, Array, Array]:
    q, k, v = shape.tokens(key)
    return q[:, :, first * ratio : last * ratio], k[:, :, first:last], v[:, :, first:last]

  everything = functools.partial(heads, 0, shape.N)
  functions: dict[str, tuple[Callable[..., Array], Callable[..., Any]]] = {
    "mixed": (functools.partial(_mixed, budgets), everything),
    "full heads": (_dense, functools.partial(heads, 0, full)),
    "other heads": (functools.partial(_mixed, others), functools.partial(heads, full, shape.N)),
    "all dense": (_dense, everything),
  }
  return {
    name: TimedProgram(jax.jit(_with_passes(function)), jax.jit(make_inputs))
    for name, (function, make_inputs) in functions.items()
  }


def _mixed(budgets: HeadBudgets, query: Array, key: Array, value: Array) -> Array:
  return dynamic_group_attention(query, key, value, config=budgets)


def _dense(query: Array, key: Array, value: Array) -> Array:
  B, L = query.shape[:2]
  return dense_attention(query, key, value, find_documents(B, L, None, None))


def _with_passes(function: Callable[..., Array]) -> Callable[..., Any]:
  """The function, with gradients under --backward. The output serves as its own cotangent."""
  if not _BACKWARD.value:
    return function

  def with_gradients(*arrays: Array) -> Any:
    out, pull = jax.vjp(function, *arrays)
    return out, pull(out)

  return with_gradients


if __name__ == "__main__":
  app.run(main)
