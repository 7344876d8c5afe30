"""Tests of context parallelism in a subprocess with eight simulated devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
  "arguments",
  [
    ("equal", "streaming:whole", "streaming-sinks-window:packed", "global:packed"),
    ("crowded",),
    ("bytes",),
  ],
  ids=" ".join,
)
def test_context_parallelism(arguments: tuple[str, ...]) -> None:
  """Outputs and gradients equal those of whole sequences, and traffic is far below a ring's.

  To check another config of cases.py, run under the same XLA_FLAGS:
  python -m tests.dga_jax.attention.check_context_parallel equal NAME:whole NAME:packed
  """
  flags = "--xla_force_host_platform_device_count=8"
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "tests.dga_jax.attention.check_context_parallel", *arguments]
  done = subprocess.run(
    command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
