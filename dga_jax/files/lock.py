"""Exclusive locks, held by one process and released by the kernel when it ends."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from dga_jax.files.paths import is_gcs
from dga_jax.files.storage import AnyPath

_WORKDIR_LOCK = ".lock"
# File systems without locks answer with one of these.
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF})


class LockedError(OSError):
  """Another process holds the lock."""


@contextlib.contextmanager
def hold_workdir(workdir: AnyPath) -> Iterator[None]:
  """Keeps other processes from writing to a run's folder; readers need no lock.

  An object store has no locks that end with their process. A warning is logged there.

  Raises:
    LockedError: another process writes to it.
    NotADirectoryError: it is a file.
  """
  if is_gcs(workdir):
    logging.warning("%s has no locks: do not start a second run there.", workdir)
    yield
    return
  if workdir.exists() and not workdir.is_dir():
    raise NotADirectoryError(f"{workdir} is a file; it must be a folder. Give another --workdir.")
  try:
    with hold_lock(workdir / _WORKDIR_LOCK):
      yield
  except LockedError as error:
    raise LockedError(
      f"Another process writes to {workdir}: {error}. Wait for it, stop it, or give another "
      "--workdir."
    ) from error


@contextlib.contextmanager
def hold_lock(path: Path, *, wait: bool = False) -> Iterator[None]:
  """Holds an exclusive lock on a file for the duration of the context.

  The lock belongs to the open file (flock): it ends with the process, also after SIGKILL, so a
  file that is left over locks nothing. Where the file system has no locks, a warning is logged.

  Args:
    path: the lock's file, created if missing. While locked it names its holder, unless the disk is
      full.
    wait: wait for another holder to finish, in place of an error.

  Raises:
    LockedError: another process holds the lock and `wait` is False; the message names the holder.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  # Without a buffer, `close` does not repeat a write that has failed.
  with path.open("ab+", buffering=0) as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      holder = file.read(200).decode(errors="replace").strip()
      message = f"{path} is locked by {holder or 'another process'}"
      if not wait:
        raise LockedError(message) from error
      logging.info("Waiting: %s.", message)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
      if error.errno not in _UNSUPPORTED:
        raise
      logging.warning("%s cannot be locked (%s).", path, error.strerror)
    file.truncate(0)
    try:
      file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:  # On a full disk the lock holds without the name.
      logging.warning("%s cannot be written (%s).", path, error.strerror)
    yield
    file.truncate(0)
