"""Puts one sentence in the place of jax's report of a lost process.

jax.distributed watches the processes of a run from C++ threads. When one of them is gone or silent,
it writes a report with a C++ stack to standard error and aborts this process; no Python code runs
after that. So `install` sends file descriptor 2 through a small process of its own, which runs this
file: it copies everything but those reports, and then says what has happened.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

# A line of the C++ log: severity, date, time, thread, file, message.
_HEADER = re.compile(rb"[IWEF]\d{4} [\d:.]+ +\d+ ([\w.]+):\d+\] (.*)")
_COORDINATION = re.compile(rb"coordination_\w+\.cc|client\.h")
_FATAL = b"the JAX distributed service detected fatal errors"
_SILENT = b"stopped sending heartbeats"


def install(workdir: str | os.PathLike[str]) -> None:
  """Sends what C++ code writes to standard error through the filter, until this process ends.

  Python's own `sys.stderr` goes around the filter, and stays a terminal if it is one.
  """
  sys.stderr.flush()
  outer = os.dup(2)
  read_end, write_end = os.pipe()
  command = [sys.executable, "-I", "-S", __file__, os.fspath(workdir)]
  # A session of its own: Ctrl-C in the terminal does not end it before the trainer.
  subprocess.Popen(command, stdin=read_end, stdout=outer, start_new_session=True)
  os.close(read_end)
  os.dup2(write_end, 2)
  os.close(write_end)
  sys.stderr = os.fdopen(outer, "w", buffering=1)


def filter_lines(lines: Iterable[bytes], workdir: str | os.PathLike[str]) -> Iterator[bytes]:
  """The lines without jax's reports of lost processes; a sentence follows the fatal one."""
  is_dropped = False
  report: list[bytes] = []
  for line in lines:
    header = _HEADER.match(line)
    if header and not report:
      is_dropped = bool(_COORDINATION.fullmatch(header[1]))
      if is_dropped and _FATAL in header[2]:
        report.append(header[2])
        continue
    if report:
      report.append(line)
    elif not is_dropped:
      yield line
  if report:
    yield _describe(report, workdir).encode()


def _describe(report: list[bytes], workdir: str | os.PathLike[str]) -> str:
  """A sentence for a fatal report."""
  text = b"\n".join(report)
  silent = re.search(_SILENT + rb"\):?\s*((?:\d+\s+)+)", text)
  who = (
    f"process {', '.join(silent[1].decode().split())} of the run does not answer"
    if silent
    else "the processes of the run have lost each other, most likely because one of them is gone"
  )
  return (
    f"This process stops: {who}; see its log. {newest_checkpoint_note(workdir)} Start "
    "all processes again with the same command.\n"
  )


def newest_checkpoint_note(workdir: str | os.PathLike[str]) -> str:
  """A sentence that names a run's newest checkpoint; it needs the standard library alone."""
  if os.fspath(workdir).startswith("gs://"):  # The standard library cannot list a bucket.
    return f"The checkpoints are in {os.fspath(workdir)}/checkpoints."
  folder = Path(workdir, "checkpoints")
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  steps = [int(name) for name in names if name.isdecimal()]
  return f"The newest checkpoint is of step {max(steps)}." if steps else "There is no checkpoint."


if __name__ == "__main__":
  for shown in filter_lines(iter(sys.stdin.buffer.readline, b""), sys.argv[1]):
    sys.stdout.buffer.write(shown)
    sys.stdout.buffer.flush()
