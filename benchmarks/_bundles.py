"""Parser of the kernel schedules that libtpu dumps while it compiles.

A bundle is the set of instructions that a TPU core issues in one cycle when nothing stalls. The
dump of a kernel marks the start of each loop and predicated region. A part is the run of bundles
between two such marks. The dump does not contain how often a part runs; the caller supplies that.
"""

import pathlib
import re
from typing import NamedTuple

# Bundles. Parts up to this length hold only addresses, branches and waits.
SMALL = 60
_LINE = re.compile(r"\s*(?:0x)?([0-9a-f]+)\s+((?:[A-Z]{2},? ?)*)\s*:\s*((?:> ?)*)")


def libtpu_flags(folder: pathlib.Path) -> str:
  """The value of LIBTPU_INIT_ARGS that makes libtpu dump kernel schedules into a folder."""
  return (
    f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final_bundles"
  )


class Schedule(NamedTuple):
  """The number of bundles in each part of a kernel, in program order.

  Attributes:
    prologue: parts outside inner loops, before the first inner loop.
    loops: one iteration of each inner loop.
    epilogue: parts outside inner loops, after the first inner loop.
    small: sum of all parts of at most SMALL bundles.
  """

  prologue: list[int]
  loops: list[int]
  epilogue: list[int]
  small: int

  @property
  def outside_loops(self) -> int:
    """Bundles outside the inner loops."""
    return sum(self.prologue) + sum(self.epilogue) + self.small


def read_schedules(folder: pathlib.Path) -> dict[str, Schedule]:
  """The schedules of all Mosaic kernels of a dumped program, by kernel name.

  libtpu may shorten the name of a kernel.
  """
  found = {}
  for path in sorted(folder.glob("*-final_bundles.txt")):
    text = path.read_text(errors="replace")
    if "schedule-analysis" in path.name or "tpu_custom_call" not in _analysis_text(path):
      continue
    name = re.sub(r"^\d+-", "", path.name)
    if not name.startswith("TLP-"):  # "TLP" is the XLA program that calls the kernels.
      found[re.sub(r"-\d+-final_bundles\.txt$", "", name)] = _parse_schedule(text)
  return found


def _analysis_text(path: pathlib.Path) -> str:
  """The schedule analysis that libtpu wrote for the same kernel; "" without one."""
  stem = re.sub(r"-\d+-final_bundles\.txt$", "", path.name)
  files = [
    p for p in path.parent.iterdir() if p.name.startswith(stem + "-") and "analysis_final" in p.name
  ]
  return files[0].read_text(errors="replace") if files else ""


def _parse_schedule(text: str) -> Schedule:
  marks: dict[int, bool] = {0: False}  # First address of a part: whether it is an inner loop.
  end = 0
  for line in text.splitlines():
    if not (match := _LINE.match(line)):
      continue
    address, labels, depth = int(match[1], 16), match[2], match[3].count(">")
    end = address + 1
    if "LB" in labels or "PF" in labels or "sbr.rel" in line:
      marks[address] = marks.get(address, False) or ("LB" in labels and depth >= 2)
  starts = sorted(marks)
  parts = [(b - a, marks[a]) for a, b in zip(starts, [*starts[1:], end], strict=True)]
  big = [part for part in parts if part[0] > SMALL]
  first_loop = next((i for i, (_, is_loop) in enumerate(big) if is_loop), len(big))
  return Schedule(
    prologue=[size for size, is_loop in big[:first_loop] if not is_loop],
    loops=[size for size, is_loop in big if is_loop],
    epilogue=[size for size, is_loop in big[first_loop:] if not is_loop],
    small=sum(size for size, _ in parts if size <= SMALL),
  )
