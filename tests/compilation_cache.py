"""One cache of compiled programs for all test processes, which persists in the checkout.

Most of a test's time is compilation. The key of a program contains its text, the version of the
compiler and its options. The name of the folder identifies the processor, because a program may use
the processor's instructions.
"""

import hashlib
import os
import platform
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


def _processor() -> str:
  """A digest of the processor's name and instruction sets."""
  info = _CPU_INFO.read_text(encoding="utf-8") if _CPU_INFO.exists() else ""
  lines = {line for line in info.splitlines() if line.startswith(("flags", "Features", "model"))}
  text = "\n".join([platform.machine(), platform.processor(), *sorted(lines)])
  return hashlib.sha256(text.encode()).hexdigest()[:16]


FOLDER = Path(__file__).parents[1] / ".pytest_cache" / "compiled" / _processor()

ENVIRONMENT = {
  "JAX_COMPILATION_CACHE_DIR": str(FOLDER),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def share() -> None:
  """Makes this process and its subprocesses use the cache. Call it before importing jax.

  Existing environment variables have priority.
  """
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
