"""What a compiled program sends between devices, read from its text."""

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
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a program.

  Attributes:
    kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all" or "collective-permute".
    shapes: of its results on one device, such as ("bf16", (2, 128)).
    devices: how many take part in one group.
    times: how often the program runs it, by the trip counts of the loops around it.
    source: the operation of the model that it comes from, as far as the compiler says.
  """

  kind: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]
  devices: int
  times: int
  source: str

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
  return list(_walk(computations, entry, times=1))


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
      continue
    trips = _TRIPS.search(line) if operation == "while" else None
    inner = times * (int(trips[1]) if trips else 1)
    called = _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
      called += [branch.strip().lstrip("%") for branch in branches.split(",")]
    if "all-reduce-scatter" in line and operation == "fusion":
      yield from _scattered(_walk(computations, called[0], inner), line)
      continue
    for computation in called:
      yield from _walk(computations, computation, inner)


def _scattered(reductions: Iterator[Collective], line: str) -> Iterator[Collective]:
  """TPU programs hold a reduce-scatter as a fusion of an all-reduce and a slice."""
  for found in reductions:
    if found.kind == "all-reduce":
      found = dataclasses.replace(found, kind="reduce-scatter", shapes=_shapes(_result(line)))
    yield found


def _operation(line: str) -> str:
  # The type before it may hold brackets and braces, but no lower-case word before a parenthesis.
  found = _OPERATION.search(" " + re.sub(r"\{[^}]*\}", "", line))
  return found[1] if found else ""


def _result(line: str) -> str:
  """The type of an instruction's result: all before the name of the operation."""
  plain = " " + re.sub(r"\{[^}]*\}", "", line)
  found = _OPERATION.search(plain)
  return plain[: found.start()] if found else ""


def _shapes(result: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
  return tuple(
    (dtype, tuple(int(size) for size in sizes.split(",") if size))
    for dtype, sizes in _ARRAY.findall(result)
  )


def _collective(kind: str, operation: str, line: str, times: int) -> Collective:
  shapes = _shapes(_result(line))
  if operation.endswith("-start") and kind in ("all-gather", "collective-permute"):
    # The result of a start holds the operands too, and for a permutation two counters.
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
  """For each kind how many a program runs, and the bytes that a device receives in them."""
  totals: dict[str, tuple[int, float]] = {}
  for one in collectives:
    count, size = totals.get(one.kind, (0, 0.0))
    totals[one.kind] = (count + one.times, size + one.times * one.sent_bytes)
  return totals
