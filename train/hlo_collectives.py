"""Collective operations of a compiled program, parsed from its HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_OPERATION = re.compile(r" ([a-z][a-z\-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r"s32\[\] constant\((\d+)\)")
_ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a program.

  Attributes:
    kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all" or "collective-permute".
    shapes: of its results on one device, such as ("bf16", (2, 128)).
    devices: number of devices in one group.
    times: how often the program runs it, by the trip counts of the loops around it.
    source: the operation of the model that it comes from, if the compiler names one.
    channel: the compiler's number of it, for one that is part of fusions.
    open_ended: whether it is in a loop whose trip count depends on the data, which counts once.
  """

  kind: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]
  devices: int
  times: int
  source: str
  channel: str = ""
  open_ended: bool = False

  @property
  def sent_bytes(self) -> float:
    """Bytes that one device receives (and sends) in one run, by the ring algorithms.

    With S bytes of the whole result and n devices: an all-gather and an all-to-all (n - 1)/n·S, a
    reduce-scatter (n - 1) times its own part, an all-reduce, which is both, 2·(n - 1)/n·S, and a
    permutation S.
    """
    size = sum(math.prod(shape) * _item_bytes(dtype) for dtype, shape in self.shapes)
    others = (self.devices - 1) / self.devices
    return size * {
      "all-gather": others,
      "all-to-all": others,
      "all-reduce": 2 * others,
      "reduce-scatter": self.devices - 1,
      "collective-permute": 1.0,
    }.get(self.kind, 0.0)


def read_collectives(text: str) -> list[Collective]:
  """Every collective of a program.

  Args:
    text: of the compiled program, `jax.stages.Compiled.as_text()`.
  """
  computations, entry = _computations(text)
  # One collective may be part of several fusions, also in loops, and advance while they do their
  # own work. It runs as often as the fusion that runs least often.
  fused: dict[Collective, Collective] = {}
  whole = []
  for found in _walk(computations, entry, times=1):
    if not found.channel:
      whole.append(found)
      continue
    key = dataclasses.replace(found, times=0)
    if key not in fused or found.times < fused[key].times:
      fused[key] = found
  return [*whole, *fused.values()]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  computations: dict[str, list[str]] = {}
  entry, lines = "", []
  for line in text.splitlines():
    if start := _COMPUTATION.match(line):
      lines = computations.setdefault(start[2], [])
      entry = start[2] if start[1] else entry
    elif instruction := _INSTRUCTION.match(line):
      lines.append(instruction[1])
  return computations, entry


def _walk(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
  for line in computations.get(name, ()):
    operation = _operation(line)
    kind = operation.removesuffix("-start")
    if kind in _KINDS:
      yield _collective(kind, operation, line, times)
    elif operation == "fusion":
      yield from _fused(computations, line, times)
    else:
      trips = _trips(computations, line) if operation == "while" else 1
      for computation in _called(line):
        for found in _walk(computations, computation, times * (trips or 1)):
          yield found if trips else dataclasses.replace(found, open_ended=True)


def _fused(computations: dict[str, list[str]], line: str, times: int) -> Iterator[Collective]:
  """Collectives inside a fusion."""
  for computation in _called(line):
    for found in _walk(computations, computation, times):
      # TPU programs have a reduce-scatter as a fusion of an all-reduce and a slice.
      if found.kind == "all-reduce" and "all-reduce-scatter" in computation:
        yield dataclasses.replace(found, kind="reduce-scatter", shapes=_shapes(_result(line)))
      else:
        channel = re.search(r"channel_id=(\d+)", "".join(computations[computation]))
        yield dataclasses.replace(found, channel=channel[1] if channel else "")


def _called(line: str) -> list[str]:
  called = _CALLED.findall(line)
  for branches in _BRANCHES.findall(line):
    called += [branch.strip().lstrip("%") for branch in branches.split(",")]
  return called


def _trips(computations: dict[str, list[str]], line: str) -> int | None:
  """The trip count of a loop: the compiler's, or the bound of its counter; None if data decide.

  Loops over layers, micro-batches and chunks count up from 0 by 1.
  """
  if known := _TRIPS.search(line):
    return int(known[1])
  condition = _CONDITION.search(line)
  lines = [] if condition is None else computations.get(condition[1], [])
  bounds = [int(n) for inner in lines for n in _BOUND.findall(_plain(inner))]
  return bounds[0] if len(bounds) == 1 else None


def _plain(line: str) -> str:
  """An instruction without the layouts of its arrays, which may contain parentheses."""
  return " " + re.sub(r"(?<=\])\{[^}]*\}", "", line)


def _operation(line: str) -> str:
  found = _OPERATION.search(_plain(line))
  return found[1] if found else ""


def _result(line: str) -> str:
  """The type of an instruction's result: the text before the name of the operation."""
  plain = _plain(line)
  found = _OPERATION.search(plain)
  return plain[: found.start()] if found else ""


def _shapes(result: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
  return tuple(
    (dtype, tuple(int(size) for size in sizes.split(",") if size))
    for dtype, sizes in _ARRAY.findall(result)
  )


def _collective(kind: str, operation: str, line: str, times: int) -> Collective:
  shapes = _shapes(_result(line))
  if operation.endswith("-start") and kind != "all-reduce":
    # The result of a start includes the operands, and for a permutation two counters.
    shapes = tuple(shape for shape in shapes if shape != ("u32", ()))
    shapes = shapes[len(shapes) // 2 :]
  source = re.search(r'op_name="([^"]*)"', line)
  return Collective(kind, shapes, _group_size(kind, line), times, source[1] if source else "")


def _group_size(kind: str, line: str) -> int:
  if kind == "collective-permute":
    return 2
  if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
    return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", axes[2]))
  if grid := re.search(r"replica_groups=\[([\d,]+)\]<=", line):
    return int(grid[1].split(",")[-1])
  if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return len(groups[1].split(","))
  raise ValueError(f"The groups of this collective cannot be read: {line[:300]}")


def _item_bytes(dtype: str) -> float:
  bits = re.search(r"\d+", dtype)
  return _ITEM_BYTES.get(dtype) or (int(bits[0]) / 8 if bits else 1)


def by_kind(collectives: Sequence[Collective]) -> dict[str, tuple[int, float]]:
  """For each kind the number that a program runs, and the bytes that a device receives in them."""
  totals: dict[str, tuple[int, float]] = {}
  for one in collectives:
    count, size = totals.get(one.kind, (0, 0.0))
    totals[one.kind] = (count + one.times, size + one.times * one.sent_bytes)
  return totals
