"""The engine on a mesh of four simulated devices, in a process that has them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dga_jax.serving.launch import parse_mesh

ROOT = Path(__file__).parents[3]


def test_four_devices_give_the_tokens_of_one():
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }
  command = [sys.executable, "-m", "tests.dga_jax.generation.check_engine_on_mesh"]
  done = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["4", "tensor=0", "tensor=2,data=2", "tensor=99"])
def test_other_meshes_are_refused(text):
  with pytest.raises(ValueError, match="mesh is"):
    parse_mesh(text)
