"""Compiles programs for TPUs in subprocesses, and totals the bundles of their kernels."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import jax

from benchmarks._bundles import libtpu_flags, read_schedules, Schedule
from benchmarks._tpu_kernel_counts import KernelCount

_INSTRUCTION = re.compile(r"%([\w.\-]+) = \(?\w+\[([\d,]*)\]")
_ESTIMATE = re.compile(r'estimated_cycles":"(\d+)"')


class Compiled(NamedTuple):
  """What a compiled program tells about its cost.

  Attributes:
    schedules: of the kernels, by name.
    rows: for each kernel, the numbers of positions (axis -2) of its first output and of its last
      operand.
    rest: XLA's estimated cycles of the operations outside kernels.
    copies: the part of `rest` that copies or transposes whole arrays.
  """

  schedules: dict[str, Schedule]
  rows: dict[str, list[int]]
  rest: float
  copies: float

  def scaled(self, factor: float) -> "Compiled":
    """With `rest` and `copies` multiplied by a factor, for another sequence length."""
    return self._replace(rest=self.rest * factor, copies=self.copies * factor)


def compile_in_subprocess(module: str, program: str) -> Compiled:
  """Runs `module` with this process's flags and --program, which prints `describe` of a program.

  libtpu reads its flags once per process, hence the subprocess.
  """
  with tempfile.TemporaryDirectory() as folder:
    flags = libtpu_flags(pathlib.Path(folder))
    done = subprocess.run(
      [sys.executable, "-m", module, *sys.argv[1:], f"--program={program}"],
      env=os.environ | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags},
      capture_output=True,
      text=True,
      check=False,
    )
    if done.returncode:
      raise RuntimeError(f"{program} failed:\n{done.stderr[-4000:]}")
    schedules = read_schedules(pathlib.Path(folder))
  return Compiled(schedules, **json.loads(done.stdout.splitlines()[-1]))


def describe(compiled: jax.stages.Compiled) -> str:
  """JSON of all fields of `Compiled` but the schedules."""
  text = compiled.as_text()
  assert text is not None  # A compiled TPU program has a text.
  return json.dumps(read_program(text))


def read_program(text: str) -> dict[str, Any]:
  """The fields `rows`, `rest` and `copies` of `Compiled`, from a program's text."""
  shapes: dict[str, list[int]] = {}
  rows: dict[str, list[int]] = {}
  rest = copies = 0
  for line in text.splitlines():
    # Operations without an estimate have −1, written as an unsigned integer.
    cycles = sum(int(x) for x in _ESTIMATE.findall(line) if int(x) < 2**62)
    rest += cycles
    if " copy(" in line or " transpose(" in line:
      copies += cycles
    if (found := _INSTRUCTION.search(line)) is None:
      continue
    name, shape = found[1], [int(size) for size in found[2].split(",") if size]
    shapes[name] = shape
    if "tpu_custom_call" in line:
      operands = re.findall(r"%([\w.\-]+)", line.split("custom-call(")[1].split(")")[0])
      rows[name] = [x[-2] for x in (shape, shapes[operands[-1]]) if len(x) > 1]
  return {"rows": rows, "rest": float(rest), "copies": float(copies)}


def totals(compiled: Compiled, counts: list[KernelCount]) -> dict[str, float]:
  """Bundles of the forward and the backward pass, and of the merging kernels in each.

  Raises:
    ValueError: a count has no kernel, or a kernel has no count.
  """
  found = dict.fromkeys(("forward", "backward", "forward merging", "backward merging"), 0.0)
  uncounted = dict(compiled.schedules)
  for count in counts:
    names = [name for name in uncounted if _is_counted(name, count, compiled)]
    if not names:
      raise ValueError(f"no kernel of {sorted(uncounted)} is {count.kernel!r}, rows {count.rows}")
    for name in names:
      bundles = count.bundles(uncounted.pop(name))
      found[count.direction] += bundles
      if count.is_merge:
        found[f"{count.direction} merging"] += bundles
  if uncounted:
    raise ValueError(f"kernels without a KernelCount: {sorted(uncounted)}")
  return found


def _is_counted(name: str, count: KernelCount, compiled: Compiled) -> bool:
  if count.kernel not in name:
    return False
  if count.rows is None:
    return True
  # A dumped name may have a suffix that the program's name lacks.
  instruction = max((x for x in compiled.rows if name.startswith(x)), key=len)
  return count.rows in compiled.rows[instruction]
