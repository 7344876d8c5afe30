"""One cache of compiled programs for all test processes of a user, which persists between runs.

Most of a test's time is compilation. The key of a program contains its text, the version of the
compiler and its options. The name of the folder identifies the processor, because a program may use
the processor's instructions.
"""

import hashlib
import os
import platform
import shutil
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


def _processor() -> str:
  """A digest of the processor's name and instruction sets."""
  info = _CPU_INFO.read_text(encoding="utf-8") if _CPU_INFO.exists() else ""
  lines = {line for line in info.splitlines() if line.startswith(("flags", "Features", "model"))}
  text = "\n".join([platform.machine(), platform.processor(), *sorted(lines)])
  return hashlib.sha256(text.encode()).hexdigest()[:16]


_CACHE_HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
FOLDER = _CACHE_HOME / "dga-jax" / "compiled-tests" / _processor()
_LARGEST_BYTES = 2 << 30

ENVIRONMENT = {
  "JAX_COMPILATION_CACHE_DIR": str(FOLDER),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def share() -> None:
  """Makes this process and its subprocesses use the cache. Call it before importing jax.

  Existing environment variables have priority. A cache of more than 2 GiB is emptied.
  """
  if FOLDER.is_dir() and sum(path.stat().st_size for path in FOLDER.iterdir()) > _LARGEST_BYTES:
    shutil.rmtree(FOLDER, ignore_errors=True)
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
