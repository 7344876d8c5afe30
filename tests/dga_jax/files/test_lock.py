"""File locks between real processes."""

import errno
import fcntl
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dga_jax.files.lock import hold_lock, hold_workdir, LockedError

ROOT = Path(__file__).parents[3]
_HOLD = """
import sys, time
from pathlib import Path
from dga_jax.files.lock import hold_lock
with hold_lock(Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


def test_a_lock_names_its_holder_and_ends_with_a_kill(tmp_path: Path) -> None:
  path = tmp_path / "folder" / "lock"
  command = [sys.executable, "-c", _HOLD, str(path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    named = rf"lock is locked by process {holder.pid} on \S+"
    with pytest.raises(LockedError, match=named), hold_lock(path):
      pass
    holder.send_signal(signal.SIGKILL)
  with hold_lock(path):
    pass
  # The remaining file does not lock.
  assert path.exists()
  with hold_lock(path):
    pass


def test_waiting_for_another_holder(tmp_path: Path) -> None:
  path = tmp_path / "lock"
  order = []

  def wait() -> None:
    with hold_lock(path, wait=True):
      order.append("second")

  thread = threading.Thread(target=wait)
  with hold_lock(path):
    thread.start()
    thread.join(0.5)
    order.append("first")
  thread.join(10)
  assert order == ["first", "second"]


def test_a_file_system_without_locks(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  def flock(*_: object) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")

  monkeypatch.setattr(fcntl, "flock", flock)
  with hold_lock(tmp_path / "lock"):
    pass
  assert re.search(r"lock cannot be locked \(Function not implemented\)", caplog.text)


def test_a_workdir_is_a_folder(tmp_path: Path) -> None:
  (tmp_path / "run").write_text("")
  with (
    pytest.raises(NotADirectoryError, match=r"run is a file; .*another --workdir"),
    hold_workdir(tmp_path / "run"),
  ):
    pass
