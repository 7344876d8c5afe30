"""The filter of standard error: JAX's reports of lost processes become one sentence."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from train.abort_filter import filter_lines

ROOT = Path(__file__).parents[2]
SILENT = b"""\
W1129 08:57:30.0 12435 other.cc:7] A warning of something else.
E1129 08:57:40.995211   12435 coordination_service.cc:1518] [92] Use error polling to propagate:
1
The tasks have crashed.
=== Source Location Trace: ===
coordination_service.cc:232

E1129 08:57:40.995721   12446 coordination_service_agent.cc:288] Polled an error.
F1129 08:57:40.995872   12446 client.h:86] Terminating process because the JAX distributed service \
detected fatal errors. UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
1
3
The tasks have crashed. Check the task logs for an earlier error.

RPC: /xla.coordination.CoordinationService/PollForError
*** Check failure stack trace: ***
    @     0x7fb10ed3d7d4  absl::log_internal::LogMessage::SendToLog()
Fatal Python error: Aborted
"""
GONE = b"""\
F1129 08:58:08.689251   12812 client.h:86] Terminating process because the JAX distributed service \
detected fatal errors. This most likely indicates that another task died
:UNAVAILABLE:Stream removed (Socket closed)
*** Check failure stack trace: ***
"""


def shown(text: bytes, workdir: Path) -> str:
  return b"".join(filter_lines(text.splitlines(keepends=True), workdir)).decode()


def test_an_unresponsive_process_is_reported_with_the_checkpoint(tmp_path: Path) -> None:
  (tmp_path / "checkpoints" / "30").mkdir(parents=True)
  (tmp_path / "checkpoints" / "9").mkdir()
  (tmp_path / "checkpoints" / "31.orbax-checkpoint-tmp").mkdir()
  warning, sentence = shown(SILENT, tmp_path).splitlines()
  assert warning.endswith("A warning of something else.")
  assert sentence == (
    "This process stops: process 1, 3 of the run does not answer; see its log. The newest "
    "checkpoint is of step 30. Start all processes again with the same command."
  )


def test_a_process_that_ended_is_reported(tmp_path: Path) -> None:
  assert shown(GONE, tmp_path) == (
    "This process stops: the processes of the run have lost each other, most likely because one of "
    "them is gone; see its log. There is no checkpoint. Start all processes again with the same "
    "command.\n"
  )


@pytest.mark.parametrize(
  "text",
  [
    b"plain text\nof two lines, the second without an end",
    b"I0101 00:00:00.0 1 other.cc:1] [Gloo] Rank 0 is connected\n",
    b"F0101 00:00:00.0 1 other.cc:1] Check failed: x == y\n*** Check failure stack trace: ***\n",
    b"\xff\0\n",
  ],
)
def test_other_text_passes_unchanged(text: bytes, tmp_path: Path) -> None:
  assert b"".join(filter_lines(text.splitlines(keepends=True), tmp_path)) == text


_CHILD = """
import os, sys
from pathlib import Path
from train import abort_filter
abort_filter.install(Path(sys.argv[1]))
print("of Python", file=sys.stderr)
os.write(2, b"of C++\\n" + sys.argv[2].encode())
os.abort()
"""


def test_the_filter_works_in_a_process_that_aborts(tmp_path: Path) -> None:
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(_CHILD), str(tmp_path), GONE.decode()],
    cwd=ROOT,
    env=os.environ,
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )
  first, second, sentence = done.stderr.splitlines()
  assert {first, second} == {"of Python", "of C++"}
  assert sentence.startswith("This process stops: the processes of the run have lost each other")
