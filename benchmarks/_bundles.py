"""Scheduled bundles of TPU kernels, read from what libtpu writes while it compiles.

A bundle is what a core issues in one cycle when nothing stalls. The text of a kernel's schedule
marks where loops and predicated regions begin; between two marks lies a part. How often each part
runs is not in the schedule: callers know it.
"""

import pathlib
import re
from typing import NamedTuple

_SMALL = 60  # bundles: shorter parts are addresses, branches and waits
_LINE = re.compile(r"\s*(?:0x)?([0-9a-f]+)\s+((?:[A-Z]{2},? ?)*)\s*:\s*((?:> ?)*)")


def libtpu_flags(folder: pathlib.Path) -> str:
  """The value of LIBTPU_INIT_ARGS under which libtpu writes schedules into a folder."""
  return (
    f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final_bundles"
  )


class Schedule(NamedTuple):
  """A kernel's parts, in bundles and in program order."""

  before: list[int]  # straight parts before the first inner loop
  loops: list[int]  # inner loops, one iteration
  after: list[int]  # straight parts behind the first inner loop
  small: int  # all short parts together

  @property
  def straight(self) -> int:
    """All but the loops."""
    return sum(self.before) + sum(self.after) + self.small


def read_schedules(folder: pathlib.Path) -> dict[str, Schedule]:
  """All Mosaic kernels of a program, by name. A name may be a part of the kernel's own."""
  found = {}
  for path in sorted(folder.glob("*-final_bundles.txt")):
    text = path.read_text(errors="replace")
    if "schedule-analysis" in path.name or "tpu_custom_call" not in _analysis(path):
      continue
    name = re.sub(r"^\d+-", "", path.name)
    if not name.startswith("TLP-"):  # the program around the kernels
      found[re.sub(r"-\d+-final_bundles\.txt$", "", name)] = _schedule(text)
  return found


def _analysis(path: pathlib.Path) -> str:
  stem = re.sub(r"-\d+-final_bundles\.txt$", "", path.name)
  files = [
    p for p in path.parent.iterdir() if p.name.startswith(stem + "-") and "analysis_final" in p.name
  ]
  return files[0].read_text(errors="replace") if files else ""


def _schedule(text: str) -> Schedule:
  marks: dict[int, bool] = {0: False}  # address of a part, whether it is an inner loop
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
  big = [part for part in parts if part[0] > _SMALL]
  first_loop = next((i for i, (_, is_loop) in enumerate(big) if is_loop), len(big))
  return Schedule(
    before=[size for size, is_loop in big[:first_loop] if not is_loop],
    loops=[size for size, is_loop in big if is_loop],
    after=[size for size, is_loop in big[first_loop:] if not is_loop],
    small=sum(size for size, _ in parts if size <= _SMALL),
  )
