"""A note about an NVIDIA GPU that jax does not use, made without importing jax."""

import importlib.util
import os
import sys
from pathlib import Path

_DEVICES = Path("/dev")
_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def warn_about_unused_gpu() -> None:
  """Says on stderr that jax is the CPU build although there is an NVIDIA GPU, and what mends it.

  Says nothing if JAX_PLATFORMS chooses the platform.
  """
  if os.environ.get("JAX_PLATFORMS"):
    return
  if not any(_DEVICES.glob("nvidia[0-9]*")) or any(map(importlib.util.find_spec, _PLUGINS)):
    return
  print(
    "note: this machine has an NVIDIA GPU, and jax is the build for CPUs, which does not use it."
    ' For CUDA 13: pip install "dga-jax[gpu]". JAX_PLATFORMS=cpu hides this note.',
    file=sys.stderr,
  )
